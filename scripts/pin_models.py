"""Pin what the catalogue's models are made of: the hub's current commit of each repository, and the
size and SHA-256 of its weight files. Whoever downloads gets exactly these, from any hub.

    .venv/bin/python scripts/pin_models.py [MODEL ...]           write them into models.json
    .venv/bin/python scripts/pin_models.py [MODEL ...] --check   say what has changed, write nothing

HF_ENDPOINT names a mirror; the hub is trusted here, so name one only that you trust.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qwen_image_tool.catalog
from qwen_image_tool.catalog import Catalog, Model, Variant
from qwen_image_tool.errors import DownloadFailed, ToolError
from qwen_image_tool.files import replace_file
from qwen_image_tool.settings import load_settings
from qwen_image_tool.store.hub import COMMIT, OTHER_SOURCE, Hub, Listing, connect
from qwen_image_tool.store.published import list_files, model_files, variant_file
from qwen_image_tool.store.record import OWN, Kept

CATALOG = Path(qwen_image_tool.catalog.__file__).with_name("models.json")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all, where none is named")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    parser.add_argument("--catalog", type=Path, default=CATALOG)
    options = parser.parse_args(arguments)
    try:
        changed = pin(options.catalog, options.models, _hub(), write=not options.check)
    except ToolError as error:
        print(f"pin_models: {error}", file=sys.stderr)
        return 1
    print("\n".join(changed) or "All is pinned as the hub has it.")
    return 1 if options.check and changed else 0


def pin(catalog: Path, models: Sequence[str], hub: Hub, write: bool) -> list[str]:
    """A line for each repository whose pins change; all are written, or none. Raises ToolError."""
    raw = json.loads(catalog.read_text(encoding="utf-8"))
    known = Catalog.model_validate(raw)
    wanted = [known.find(name) for name in models] or [m for m in known.models if m.repo]
    changed = []
    for row in raw["models"]:
        for model in (model for model in wanted if model.id == row["id"]):
            changed += _set(row, model.id, _pins_of(model, hub))
            for line, variant in zip(row.get("variants", []), model.variants, strict=True):
                changed += _set(line, f"{model.id} {variant.id}", _pins_of_variant(variant, hub))
    Catalog.model_validate(raw)
    if changed and write:
        text = json.dumps(raw, ensure_ascii=False, indent=2) + "\n"
        replace_file(catalog, text.encode())
    return changed


def _pins_of(model: Model, hub: Hub) -> dict[str, Any]:
    listing = _listed(hub, model.repo)
    files = model_files(model, listing, OWN)
    return {
        "revision": listing.revision,
        "pinned": {file.source: _pinned(file) for file in files if file.is_weights},
    }


def _pins_of_variant(variant: Variant, hub: Hub) -> dict[str, Any]:
    listing = _listed(hub, variant.repo)
    file = variant_file(variant.model_copy(update={"pinned": None}), listing)
    return {"revision": listing.revision, "pinned": _pinned(file), "bytes": file.size}


def _listed(hub: Hub, repo: str) -> Listing:
    listing = list_files(hub, repo)
    if not COMMIT.fullmatch(listing.revision):
        said = f"{hub.endpoint} does not tell the commit of {repo}."
        raise DownloadFailed("server", said, OTHER_SOURCE)
    return listing


def _pinned(file: Kept) -> dict[str, Any]:
    if not file.sha256:
        said = f"The hub gives no SHA-256 of {file.source} of {file.repo}."
        raise DownloadFailed("server", said, OTHER_SOURCE)
    return {"bytes": file.size, "sha256": file.sha256}


def _set(row: dict[str, Any], name: str, pins: dict[str, Any]) -> list[str]:
    if all(row.get(key) == value for key, value in pins.items()):
        return []
    before = row.get("revision") or "nothing"
    row.update(pins)
    return [f"{name}: {before} -> {pins['revision']}"]


def _hub() -> Hub:
    return connect(local=load_settings().local_hub)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
