"""Twenty-four pictures with their sentences under them: docs/practice_contact_sheet.png."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from evaluate import GUIDANCE, STEPS, WEIGHTS, Task, draw, load_pipeline
from PIL import Image, ImageDraw, ImageFont
from world import SQUARE, Scene

PROMPTS = (
    "a red circle left of a blue square on a yellow background",
    "a white star above a pink heart on a purple background",
    'a yellow letter "A" on a blue background',
    "a small black cross inside a large orange circle on a white background",
    "a green diamond on a black background",
    "a pink heart, a white star and a yellow circle on a blue background",
    'an orange "Q" right of a purple "I" on a white background',
    "a blue ring at the top left and a red triangle at the bottom right on a pink background",
    "a large white letter T on a green background",
    "a yellow circle inside a purple square on an orange background",
    "a brown square below a white circle on a green background",
    "a small red heart in the centre on a white background",
    "a purple triangle right of an orange ring on a black background",
    'a pink "M" above a yellow "W" on a brown background',
    "a black star in the top right corner on a yellow background",
    "a white letter R, a black letter G and a yellow letter B on a red background",
    "a blue heart inside a pink diamond on a white background",
    "a large green circle on an orange background",
    "a red cross left of a white cross on a blue background",
    "an orange star at the bottom and a white ring at the top on a purple background",
    'a black "Z" on a pink background',
    "a yellow diamond above a red square on a white background",
    "a white ring on a black background",
    "a purple heart, a green triangle and a red star on a yellow background",
)
COLUMNS, GAP, CAPTION = 6, 16, 52


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[2] / "docs/practice_contact_sheet.png"
    )
    args = parser.parse_args()
    tasks = [Task(prompt, Scene(()), SQUARE, seed=7) for prompt in PROMPTS]
    pictures = draw(load_pipeline(args.weights, args.device), 12, tasks, args.steps, args.guidance)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, PROMPTS).save(args.out, optimize=True)


def sheet(pictures: list[Image.Image], prompts: tuple[str, ...]) -> Image.Image:
    side = SQUARE[0]
    rows = -(-len(pictures) // COLUMNS)
    size = (COLUMNS * (side + GAP) + GAP, rows * (side + CAPTION + GAP) + GAP)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(15)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x = GAP + index % COLUMNS * (side + GAP)
        y = GAP + index // COLUMNS * (side + CAPTION + GAP)
        page.paste(picture, (x, y))
        pen.text((x, y + side + 8), textwrap.fill(prompt, 36), fill=(60, 60, 60), font=font)
    return page


if __name__ == "__main__":
    main()
