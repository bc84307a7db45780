"""Which heights of a strip give the bits of the whole frame, for each convolution of the decoder.

    .venv/bin/python benchmarks/heights.py [--small]

On few pixels a GPU's library takes another kernel for another height, which adds in another order;
from there on the picture differs by rounding. Each line is one convolution, the first of its shape,
as the decoder calls it for the whole frame and for a strip: the rows of the whole frame, then the
heights that keep its bits, of every fourth below it.
"""

import argparse
from itertools import groupby

import diffusers
import torch

from decode import CLASSES, NARROW, SIZES
from qwen_image_tool.catalog import Family
from qwen_image_tool.decoding import DECODINGS
from qwen_image_tool.engine import vae
from qwen_image_tool.engine.probe import torch_facts
from qwen_image_tool.types import Size

STEP = 4  # rows
Seen = dict[tuple[object, ...], tuple[vae._Conv, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(CLASSES), default=tuple(CLASSES))
    parser.add_argument("--sizes", type=Size.parse, nargs="+", help="as 1024x1024")
    parser.add_argument("--small", action="store_true", help="narrow decoders and small frames")
    options = parser.parse_args()
    torch_facts()  # sets the allocator as the program does
    diffusers.logging.set_verbosity_error()
    with torch.inference_mode():
        for family in options.models:
            for size in options.sizes or ([Size(128, 128)] if options.small else SIZES[family]):
                print(f"{family} {size}", flush=True)
                for conv, frame in convolutions(family, size, options).values():
                    print(line(conv, frame), flush=True)


def convolutions(family: Family, size: Size, options: argparse.Namespace) -> Seen:
    """What the decoder convolves when it decodes one picture in one piece, in its order."""
    torch.manual_seed(0)
    with torch.device(options.device):
        made = CLASSES[family](**NARROW[family] if options.small else {})
    made = made.to(torch.bfloat16).eval().requires_grad_(False)
    rows, columns = size.height // vae.scale(made), size.width // vae.scale(made)
    latents = torch.randn(1, made.config.z_dim, 1, rows, columns, device=options.device)
    vae.make_single_frame(made, DECODINGS[family], faithful=True)
    seen: Seen = {}

    def keep(conv: vae._Conv, given: tuple[torch.Tensor, ...]) -> None:
        key = conv.weight.shape, given[0].shape, conv.faithful
        if conv.weight.shape[-1] > 1:
            seen.setdefault(key, (conv, given[0].clone()))

    convs = (module for module in made.decoder.modules() if isinstance(module, vae._Conv))
    hooks = [conv.register_forward_pre_hook(keep) for conv in convs]
    vae.levels(made, latents.to(torch.bfloat16))
    for hook in hooks:
        hook.remove()
    return seen


def line(conv: vae._Conv, frame: torch.Tensor) -> str:
    conv.sees_zeros = True
    whole, height = conv(frame), frame.shape[2]
    conv.sees_zeros = False
    kept = list[tuple[int, bool]]()
    for rows in range(STEP, height, STEP):
        start = (height - rows) // 2
        strip = conv(frame[:, :, start : start + rows].contiguous())[:, :, 1:-1]
        kept.append((rows, torch.equal(strip, whole[:, :, start + 1 : start + rows - 1])))
    groups = groupby(kept, key=lambda each: each[1])
    runs = [[rows for rows, _ in run] for keeps, run in groups if keeps]
    words = [f"{run[0]}-{run[-1]}" for run in runs]
    shape = "x".join(map(str, conv.weight.shape))
    return f"{shape}{' faithful' if conv.faithful else ''}, {height}: {' '.join(words) or 'none'}"


if __name__ == "__main__":
    main()
