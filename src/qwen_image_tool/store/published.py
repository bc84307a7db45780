"""What makes up a model at the hub: which files, from which commit, and their small texts."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from qwen_image_tool.catalog import Model, PinnedFile, Variant
from qwen_image_tool.errors import DownloadFailed
from qwen_image_tool.store.hub import (
    OTHER_SOURCE,
    Hub,
    Listing,
    RemoteFile,
    Transient,
    safe_name,
)
from qwen_image_tool.store.patience import Check, sleep
from qwen_image_tool.store.record import OWN, Digest, Kept, transformer_folder

TEXTS = (".json", ".txt", ".jinja", ".model")
MAX_LICENCE = 1 << 20  # bytes
TRIES = 5

Answer = TypeVar("Answer")


def _insist(ask: Callable[[], Answer], what: str, check: Check) -> Answer:
    """The answer to a short question, after a few tries. Raises DownloadFailed, and what `check`
    does."""
    from tenacity import (
        Retrying,
        retry_if_exception_type,
        stop_after_attempt,
        wait_random_exponential,
    )

    tries = Retrying(
        retry=retry_if_exception_type(Transient),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(0.2, 10),
        sleep=functools.partial(sleep, check=check),
        reraise=True,
    )

    def once() -> Answer:
        check()
        return ask()

    try:
        return tries(once)
    except Transient as error:
        raise DownloadFailed(
            error.kind,
            f"{what} can't be read: {error}.",
            "Check the connection. Where huggingface.co can't be reached, set HF_ENDPOINT to a"
            " mirror, or source = 'modelscope' in the config file.",
        ) from error


def list_files(hub: Hub, repo: str, revision: str = "", check: Check = lambda: None) -> Listing:
    """The files of `repo` at `revision`, or at its current commit. `check` may raise to end it.
    Raises DownloadFailed."""
    return _insist(lambda: hub.list(repo, revision, check), f"The list of files of {repo}", check)


def pinned(listing: Listing, pins: Mapping[str, PinnedFile]) -> Listing:
    """The listing with the sizes and hashes of `pins`, where the hub gives none. Raises
    DownloadFailed where it gives others, or lacks such a file."""
    return replace(listing, files=listing.files | dict(_pinned(listing, pins)))


def _pinned(listing: Listing, pins: Mapping[str, PinnedFile]) -> Iterator[tuple[str, RemoteFile]]:
    for path, pin in pins.items():
        if path not in listing.files:
            raise _absent(path, listing)
        found = listing.files[path]
        if found.size not in (-1, pin.bytes) or found.sha256 not in ("", pin.sha256):
            raise DownloadFailed(
                "changed",
                f"{listing.repo} has another {path} than the one this version was made for.",
                "Update QwenImageTool, or take another source. Nothing was fetched in its place.",
            )
        yield path, RemoteFile(path, pin.bytes, pin.sha256)


def licence_text(hub: Hub, listing: Listing, check: Check) -> str:
    """Of the repository; "" where it has none. Raises DownloadFailed, and what `check` does."""
    file = next((file for path, file in listing.files.items() if _is_licence(path)), None)
    return _small_text(hub, listing, file, check) if file and 0 <= file.size <= MAX_LICENCE else ""


def _small_text(hub: Hub, listing: Listing, file: RemoteFile, check: Check) -> str:
    """A file's text, when its hash agrees. Raises DownloadFailed, and what `check` does."""
    kept = _kept(file, file.path, listing)

    def read() -> str:
        with hub.open(listing.repo, listing.revision, file, check=check) as body:
            data = b"".join(map(bytes, body.pieces))
        digest = Digest(kept)
        digest.update(data)
        if len(data) != file.size or not digest.agrees:
            raise Transient("hash", f"{file.path} came with wrong bytes")
        return data.decode(errors="replace")

    return _insist(read, file.path, check)


def model_files(
    model: Model, listing: Listing, variant: str, parts: Collection[str] = ()
) -> list[Kept]:
    """The files of a repository that make up the model, but for the weights of its transformer
    where those of another `variant` take their place, and those of `parts`.

    Raises DownloadFailed where the repository lacks a part.
    """
    bare = {*parts, *(() if variant == OWN else ("transformer",))}
    found = [file for file in listing.files.values() if _belongs(file.path, model, bare)]
    paths = {file.path for file in found}
    for name, part in model.components.items():
        weights = any(p.startswith(f"{name}/") and p.endswith(".safetensors") for p in paths)
        if part.bytes and not weights and name not in bare:
            raise _absent(f"{name}/*.safetensors", listing)
    if "model_index.json" not in paths:
        raise _absent("model_index.json", listing)
    places = {"transformer/config.json": f"{transformer_folder(variant)}/config.json"}
    return [_kept(file, places.get(file.path, file.path), listing) for file in found]


def _is_licence(path: str) -> bool:
    return path.split(".", maxsplit=1)[0].upper() in ("LICENSE", "LICENCE")


def _belongs(path: str, model: Model, bare: Collection[str]) -> bool:
    top, _, rest = path.partition("/")
    if not rest:
        return path == "model_index.json" or _is_licence(path)
    if top not in model.components or "/" in rest:
        return False
    if top in bare:
        return rest == "config.json"
    return rest.endswith((*TEXTS, ".safetensors"))


def variant_file(variant: Variant, listing: Listing) -> Kept:
    """Exactly the named file, never another one in its place. Raises DownloadFailed."""
    matches = [
        file
        for path, file in listing.files.items()
        if path == variant.file or path.endswith(f"/{variant.file}")
    ]
    if len(matches) != 1:
        raise _absent(variant.file, listing)
    path = matches[0].path
    proven = pinned(listing, {path: variant.pinned} if variant.pinned else {})
    name = path.rpartition("/")[2]
    return _kept(proven.files[path], f"{transformer_folder(variant.id)}/{name}", listing)


def _absent(what: str, listing: Listing) -> DownloadFailed:
    return DownloadFailed(
        "not found",
        f"{listing.repo} has no {what} at {listing.revision}.",
        "Choose another variant, or update QwenImageTool. Nothing was fetched in its place.",
    )


def _kept(file: RemoteFile, path: str, listing: Listing) -> Kept:
    """Raises DownloadFailed where nothing would prove that the file came whole, or its name could
    leave the folder. Of files that no model needs any name will do."""
    safe_name(file.path)
    kept = Kept(
        path=path,
        repo=listing.repo,
        revision=listing.revision,
        source=file.path,
        size=file.size,
        sha256=file.sha256,
        git_sha1=file.git_sha1,
        hub=listing.hub,
    )
    if kept.size < 0 or (kept.is_weights and not kept.identity):
        what = "size" if kept.size < 0 else "hash"
        raise DownloadFailed(
            "server",
            f"The source gives no {what} for {file.path} of {listing.repo}, so nobody could prove"
            " that it came whole.",
            OTHER_SOURCE,
        )
    return kept
