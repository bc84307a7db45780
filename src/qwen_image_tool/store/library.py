"""The models of this computer: get, prove, mend and delete them.

One folder a model in the diffusers layout. Files that several models share (Turbo's text encoder is
2.1's) are hard links to one content, so each folder is whole and the disk holds it once.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from qwen_image_tool.catalog import Catalog, Licence, Model, Variant
from qwen_image_tool.errors import (
    BadRequest,
    Cancelled,
    DownloadFailed,
    LicenceNotAccepted,
    ModelBroken,
    ModelMissing,
    ModelUnsupported,
)
from qwen_image_tool.store import verify
from qwen_image_tool.store.download import Control, Effort, Progress, check_space, fetch, to_come
from qwen_image_tool.store.formats import RUNNING, check_model, check_whole, readable
from qwen_image_tool.store.hub import OTHER_SOURCE, Hub, Listing, RemoteFile, Transient
from qwen_image_tool.store.places import Elsewhere
from qwen_image_tool.store.record import (
    IMPORTED,
    OWN,
    PRIVATE,
    Kept,
    Record,
    digest_file,
    partial_path,
    read_record,
    settle,
    transformer_folder,
    write_record,
)
from qwen_image_tool.store.verify import Fault
from qwen_image_tool.types import Event, Notice, Value

TEXTS = (".json", ".txt", ".jinja", ".model")
MAX_LICENCE = 1 << 20  # bytes
PAUSE_POLL = 0.3  # seconds
TRIES = 5

Emit = Callable[[Event], None]
Answer = TypeVar("Answer")


class Accepted(Value):
    """A licence the user agreed to, as it stood then."""

    licence: str
    url: str
    at: datetime
    text: str


class Library:
    """All that can be done with the models folder. `connect` is called when the hub is needed."""

    def __init__(
        self,
        catalog: Catalog,
        models: Path,
        connect: Callable[[], Hub],
        elsewhere: Elsewhere | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.catalog, self.models = catalog, models
        self._connect = connect
        self._elsewhere = elsewhere or Elsewhere()
        self._effort = effort or Effort()

    def folder(self, model: Model) -> Path:
        return self.models / model.id

    def record(self, model: Model) -> Record | None:
        """What was downloaded of `model`; None where nothing was. Raises ModelBroken."""
        return read_record(self.folder(model))

    def variants(self, model: Model) -> tuple[str, ...]:
        """Of its transformer, that were downloaded or imported."""
        record = _record_or_none(self.folder(model))
        return tuple(dict.fromkeys((*record.variants, *record.imported))) if record else ()

    # -- download ----------------------------------------------------------------------------

    def download(
        self,
        model: Model,
        variant: str = "",
        emit: Emit = lambda _: None,
        control: Control | None = None,
        accept_licence: bool = False,
        again: bool = False,
    ) -> Path:
        """Make `model` complete on this computer and return its folder.

        Goes on where an earlier download stopped, and links what the disk already has. Where a
        transformer was imported and no `variant` is named, the rest is fetched around that one.
        `again` deletes what was fetched first. Raises LicenceNotAccepted, DownloadFailed, Paused or
        Cancelled.
        """
        control = control or Control()
        name = self._variant_name(model, variant)
        _check_published(model)
        self._check_licence(model, accept_licence)
        folder = self.folder(model)
        with self._locked(folder):
            if again:
                self._forget_fetched(folder)
            try:
                with _pausable(folder, control):
                    record = self._plan(folder, model, name)
                    self._complete(folder, record, emit, control)
            except Cancelled:
                shutil.rmtree(folder / PRIVATE / "partial", ignore_errors=True)
                raise
            shutil.rmtree(folder / PRIVATE / "partial", ignore_errors=True)
        if faults := verify.quick(folder, record, model.components):
            raise DownloadFailed("hash", faults[0].message, "Run `qit models repair`.")
        return folder

    def to_fetch(self, model: Model, variant: str = "") -> int:
        """Bytes that a download would still take: what the model's record names and the disk lacks,
        else by the catalogue. Components that another installed model shares don't count. Asks
        nobody."""
        wanted = self._variant_name(model, variant)
        chosen = None if wanted.startswith(IMPORTED) else model.variant(wanted)
        sizes = {name: part.bytes for name, part in model.components.items()}
        if chosen:
            sizes["transformer"] = chosen.bytes
        for name, published in sizes.items():
            place = transformer_folder(wanted) if name == "transformer" else name
            owner = model.shares.get(name)
            left = self._left(model, place)
            if owner and self._left(self.catalog.find(owner), name) == 0:
                left = 0
            sizes[name] = published if left is None else left
        return sum(sizes.values())

    def _left(self, model: Model, place: str) -> int | None:
        """Bytes of a component that the disk lacks; None where the record names no file of it."""
        folder = self.folder(model)
        record = _record_or_none(folder)
        files = record.within(place) if record else ()
        if not any(file.is_weights for file in files):
            return None
        return to_come(folder, files)

    def _variant_name(self, model: Model, variant: str) -> str:
        """As the catalogue or the import wrote it. Raises BadRequest."""
        record = _record_or_none(self.folder(model))
        imported = record.imported if record else ()
        if not variant and record and OWN not in record.variants:
            variant = next((n for n in imported if n.removeprefix(IMPORTED) in RUNNING), OWN)
        if variant in imported:
            return variant
        found = model.variant(variant)
        return found.id if found else OWN

    def _plan(self, folder: Path, model: Model, name: str) -> Record:
        """The files to have with the variant `name`, pinned: an earlier record's stay as they are.
        Written to disk."""
        old = read_record(folder) or Record(model=model.id)
        if name in old.variants:
            return old
        hub = self._connect()
        files = {file.path: file for file in old.files}
        listing = self._pinned_listing(hub, model, old)
        for file in _model_files(model, listing, name):
            files.setdefault(file.path, file)
        if name not in old.imported and (variant := model.variant(name)):
            found = _variant_file(variant, _list(hub, variant.repo))
            files[found.path] = found
        self._distrust_strangers(folder, files, old)
        record = Record(
            model=model.id,
            variants=(*old.variants, name),
            files=tuple(files[path] for path in sorted(files)),
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, record)
        return record

    def _pinned_listing(self, hub: Hub, model: Model, old: Record) -> Listing:
        pinned = next((f.revision for f in old.files if f.repo == model.repo), model.revision)
        return _list(hub, model.repo, pinned)

    @staticmethod
    def _distrust_strangers(folder: Path, files: dict[str, Kept], old: Record) -> None:
        """Files that somebody put there are proven before they count; wrong ones make room."""
        known = {file.path for file in old.files}
        for file in files.values():
            path = folder / file.path
            if file.path not in known and path.is_file() and not _is(path, file):
                path.unlink()

    def _complete(self, folder: Path, record: Record, emit: Emit, control: Control) -> None:
        progress = Progress(record.model, sum(file.size for file in record.files), emit)
        wanted = []
        for file in record.files:
            if _size(folder / file.path) == file.size:
                progress.have(file.size, file.path)
            else:
                wanted.append(file)
        left = list(self._adopt(folder, wanted, progress, emit, control))
        for file in left:
            if not file.repo:
                raise DownloadFailed(
                    "not found",
                    f"{folder / file.path} was imported from {file.source}, which is not that file"
                    " any more.",
                    f"Import it again, or delete it with `qit models remove {record.model}"
                    f" --variant {file.path.split('/')[1]}`.",
                )
        if left:
            fetch(self._connect(), folder, left, progress, control, self._effort)

    def _adopt(
        self,
        folder: Path,
        wanted: Iterable[Kept],
        progress: Progress,
        emit: Emit,
        control: Control,
    ) -> Iterator[Kept]:
        """Link what this disk has already; yields what it has not."""
        wanted = list(wanted)
        ours = self._our_files()
        foreign = self._elsewhere.by_size() if wanted else {}
        for file in wanted:
            control.check()
            partial = partial_path(folder, file)
            candidates = [(path, True) for path in ours.get(file.identity, ())]
            candidates += [] if file.repo else [(Path(file.source), False)]
            candidates += [(path, False) for path in foreign.get(file.size, ())]
            source = next(((p, own) for p, own in candidates if _is(p, file)), None)
            if source is None or not _link(*source, folder / file.path, partial):
                yield file
                continue
            progress.have(file.size, file.path)
            emit(Notice(text=f"{file.path}: already on this computer ({source[0]})."))

    def _our_files(self) -> dict[str, list[Path]]:
        """The other models' files by content."""
        found: dict[str, list[Path]] = {}
        for model in self.catalog.models:
            record = _record_or_none(self.folder(model))
            for file in record.files if record else ():
                path = self.folder(model) / file.path
                if file.identity and _size(path) == file.size:
                    found.setdefault(file.identity, []).append(path)
        return found

    # -- licence -----------------------------------------------------------------------------

    def licence_text(self, model: Model) -> str:
        """The licence's own text from the model's repository; its name and address where the
        repository has none. Raises DownloadFailed."""
        licence = self.catalog.licence_of(model)
        hub = self._connect()
        listing = _list(hub, model.repo, model.revision)
        names = [n for n in listing.files if n.split(".")[0].upper() in ("LICENSE", "LICENCE")]
        if not names or not 0 <= listing.files[names[0]].size <= MAX_LICENCE:
            return f"{licence.name}\n{licence.url}"
        return _small_text(hub, listing, listing.files[names[0]])

    def accepted(self, model: Model) -> Accepted | None:
        try:
            return Accepted.from_json(self._acceptance(model).read_bytes())
        except (OSError, ValueError):
            return None

    def _acceptance(self, model: Model) -> Path:
        return self.models / "licences" / f"{model.licence}.json"

    def _check_licence(self, model: Model, accept: bool) -> None:
        licence = self.catalog.licence_of(model)
        if licence.commercial or self.accepted(model):
            return
        if not accept:
            raise LicenceNotAccepted(
                f"{model.name} is under the {licence.name}, which allows no commercial use:"
                f" {licence.url}.",
                "Read it, and add --yes-license if you agree.",
            )
        self._remember(model, licence)

    def _remember(self, model: Model, licence: Licence) -> None:
        path = self._acceptance(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        accepted = Accepted(
            licence=licence.name,
            url=licence.url,
            at=datetime.now(UTC),
            text=self.licence_text(model),
        )
        path.with_suffix(".tmp").write_text(accepted.to_json(), encoding="utf-8")
        settle(path.with_suffix(".tmp"), path)

    # -- verify, repair, remove --------------------------------------------------------------

    def verify(
        self,
        model: Model,
        full: bool = False,
        emit: Emit = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[Fault, ...]:
        """What is wrong with `model`. Raises ModelMissing (not here at all), Cancelled, and
        BadRequest for a full check of files whose hashes nobody recorded."""
        folder = self._existing(model)
        record = read_record(folder)
        if not full:
            return verify.quick(folder, record, model.components)
        if record is None:
            raise BadRequest(
                f"The hashes of {folder} are not known: its files were put there by hand.",
                f"`qit models download {model.id}` proves them, and fetches only what is wrong.",
            )
        faults = {fault.path: fault for fault in verify.full(folder, record, emit, is_cancelled)}
        for fault in verify.quick(folder, record, model.components):
            faults[fault.path] = fault  # it names the damage closer than a wrong hash does
        return tuple(faults.values())

    def repair(
        self,
        model: Model,
        emit: Emit = lambda _: None,
        control: Control | None = None,
        full: bool = True,
    ) -> tuple[Fault, ...]:
        """Fetch what is broken and nothing else; returns what was. Raises like `download`."""
        control = control or Control()
        faults = self.verify(model, full, emit, control.stopped.is_set)
        folder = self._existing(model)
        record = read_record(folder)
        if record is None:
            raise BadRequest(
                f"The files of {folder} were put there by hand.",
                f"`qit models download {model.id}` proves them, and fetches only what is wrong.",
            )
        known = {file.path for file in record.files}
        for fault in faults:
            if fault.path in model.components:  # all of it is missing, and not recorded
                raise ModelMissing(
                    fault.message, f"`qit models download {model.id}` fetches what is needed."
                )
        with self._locked(folder), _pausable(folder, control):
            for fault in faults:
                if fault.path in known:
                    (folder / fault.path).unlink(missing_ok=True)
            self._complete(folder, record, emit, control)
        return faults

    def remove(self, model: Model, variant: str = "") -> int:
        """Delete `model`, or one variant of it; returns the bytes that became free. What another
        model shares stays with that one. Raises ModelMissing, and BadRequest for a variant that
        is not here."""
        folder = self._existing(model)
        record = _record_or_none(folder)
        here = self.variants(model) if record else (OWN,)
        if variant and self._variant_name(model, variant) not in here:
            raise BadRequest(
                f"Of {model.name} no {variant} is here.", f"Here is: {', '.join(here) or 'none'}."
            )
        with self._locked(folder):
            left = record and variant and self._without(record, self._variant_name(model, variant))
            if record and left:
                gone = {folder / file.path for file in record.files if file not in left.files}
                write_record(folder, left)
                freed = sum(_delete(path) for path in gone if path.exists())
                for place in {path.parent for path in gone}:
                    if place.is_dir() and not any(place.iterdir()):
                        place.rmdir()
                return freed
            freed = self._clear(folder)
        shutil.rmtree(folder, ignore_errors=True)
        return freed

    @staticmethod
    def _without(record: Record, variant: str) -> Record | None:
        """The record without a variant; None where that leaves no transformer."""
        start = transformer_folder(variant) + "/"
        files = tuple(file for file in record.files if not file.path.startswith(start))
        names = tuple(name for name in record.variants if name != variant)
        left = Record(model=record.model, variants=names, files=files)
        return left if names or left.imported else None

    def pause(self, model: Model) -> None:
        """Ask the process that downloads `model` to stop; it does within a second or so. Raises
        ModelMissing, and BadRequest where none does."""
        folder = self._existing(model)
        if not _is_locked(folder):
            raise BadRequest(
                f"No download of {model.name} is running.",
                f"`qit models download {model.id}` starts one or goes on with it.",
            )
        (folder / PRIVATE / "pause").touch()

    def import_file(self, path: Path, model: Model) -> Path:
        """Take a transformer's file of another program into `model`'s folder as a variant: linked
        where the disk allows it, copied elsewhere. What it is, its keys and shapes say. `download`
        then fetches what the model needs beside it.

        Raises ModelBroken (also where tensors are missing), ModelUnsupported (can't be read yet)
        and BadRequest (another model's).
        """
        found = readable(path)
        if found.kind != "transformer":
            raise ModelUnsupported(
                f"{path} holds a {found.kind}, and only transformers can be imported.",
                f"`qit models download {model.id}` fetches the other parts.",
            )
        check_model(found, model, self.catalog)
        check_whole(path)
        folder, name = self.folder(model), IMPORTED + found.storage
        target = folder / transformer_folder(name) / path.name
        with self._locked(folder):
            file = Kept(
                path=target.relative_to(folder).as_posix(),
                repo="",
                revision="",
                source=str(path.resolve()),
                size=path.stat().st_size,
            )
            file = file.model_copy(update={"sha256": digest_file(path, file)[0].hex})
            old = read_record(folder) or Record(model=model.id)
            for earlier in old.weights(name):
                (folder / earlier.path).unlink(missing_ok=True)
            files = tuple(f for f in old.files if f not in old.weights(name))
            if not _link(path, False, target, partial_path(folder, file)):
                self._copy(path, target, folder, file)
            write_record(folder, old.model_copy(update={"files": (*files, file)}))
        return target

    @staticmethod
    def _copy(path: Path, target: Path, folder: Path, file: Kept) -> None:
        check_space(folder, file.size)
        partial = partial_path(folder, file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial)
        settle(partial, target)

    def _existing(self, model: Model) -> Path:
        _check_published(model)
        folder = self.folder(model)
        if not folder.is_dir():
            raise ModelMissing(
                f"{model.name} is not in {self.models}.", f"`qit models download {model.id}`."
            )
        return folder

    def _forget_fetched(self, folder: Path) -> None:
        """Delete all but what was imported: nobody could bring that back."""
        record = _record_or_none(folder)
        imported = tuple(file for file in record.files if not file.repo) if record else ()
        self._clear(folder, [folder / file.path for file in imported])
        if record and imported:
            write_record(folder, Record(model=record.model, files=imported))

    @staticmethod
    def _clear(folder: Path, keep: Iterable[Path] = ()) -> int:
        """Empty a model's folder but for `keep` and the lock that we hold."""
        kept, freed = {folder / PRIVATE / "lock", *keep}, 0
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                freed += _delete(path)
        return freed

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """One process at a time changes a model; a killed one's lock is void."""
        try:
            (folder / PRIVATE).mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / PRIVATE / "lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise DownloadFailed(
                "locked",
                f"Another process is working on {folder}.",
                "Wait for it, or stop it with `qit models pause`.",
            ) from None
        except OSError as error:
            raise DownloadFailed(
                "not writable",
                f"{folder} can't be written ({error.strerror}).",
                "Check who may write there, or set `models` in the config file.",
            ) from error
        try:
            yield
        finally:
            lock.release()


def _check_published(model: Model) -> None:
    if not model.repo:
        raise BadRequest(
            f"{model.name} comes with the program.",
            "There is nothing to download, check or delete: it is part of the installation.",
        )


def _is_locked(folder: Path) -> bool:
    """Whether a process changes the model now."""
    path = folder / PRIVATE / "lock"
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _record_or_none(folder: Path) -> Record | None:
    """For what has to work beside a record that can't be read: lists, other models, a new start."""
    try:
        return read_record(folder)
    except ModelBroken:
        return None


def _insist(ask: Callable[[], Answer], what: str) -> Answer:
    """The answer to a short question, after a few tries. Raises DownloadFailed."""
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
        reraise=True,
    )
    try:
        return tries(ask)
    except Transient as error:
        raise DownloadFailed(
            error.kind,
            f"{what} can't be read: {error}.",
            "Check the connection. Where huggingface.co can't be reached, set HF_ENDPOINT to a"
            " mirror, or source = 'modelscope' in the config file.",
        ) from error


def _list(hub: Hub, repo: str, revision: str = "") -> Listing:
    return _insist(lambda: hub.list(repo, revision), f"The list of files of {repo}")


def _small_text(hub: Hub, listing: Listing, file: RemoteFile) -> str:
    def read() -> str:
        with hub.open(listing.repo, listing.revision, file) as body:
            return b"".join(map(bytes, body.pieces)).decode(errors="replace")

    return _insist(read, file.path)


def _model_files(model: Model, listing: Listing, variant: str) -> list[Kept]:
    """The files of a repository that make up the model, but for the weights of its transformer
    where those of another `variant` take their place.

    Raises DownloadFailed where the repository lacks a part.
    """
    bare = variant != OWN
    found = [file for file in listing.files.values() if _belongs(file.path, model, bare)]
    paths = {file.path for file in found}
    for name, part in model.components.items():
        weights = any(p.startswith(f"{name}/") and p.endswith(".safetensors") for p in paths)
        if part.bytes and not weights and not (bare and name == "transformer"):
            raise _absent(f"{name}/*.safetensors", listing)
    if "model_index.json" not in paths:
        raise _absent("model_index.json", listing)
    places = {"transformer/config.json": f"{transformer_folder(variant)}/config.json"}
    return [_kept(file, places.get(file.path, file.path), listing) for file in found]


def _belongs(path: str, model: Model, bare: bool) -> bool:
    top, _, rest = path.partition("/")
    if not rest:
        return path == "model_index.json" or path.split(".", maxsplit=1)[0].upper() == "LICENSE"
    if top not in model.components or "/" in rest:
        return False
    if bare and top == "transformer":
        return rest == "config.json"
    return rest.endswith((*TEXTS, ".safetensors"))


def _variant_file(variant: Variant, listing: Listing) -> Kept:
    """Exactly the named file: never another one in its place."""
    matches = [
        file
        for path, file in listing.files.items()
        if path == variant.file or path.endswith(f"/{variant.file}")
    ]
    if len(matches) != 1:
        raise _absent(variant.file, listing)
    name = matches[0].path.rpartition("/")[2]
    return _kept(matches[0], f"{transformer_folder(variant.id)}/{name}", listing)


def _absent(what: str, listing: Listing) -> DownloadFailed:
    return DownloadFailed(
        "not found",
        f"{listing.repo} has no {what} at {listing.revision}.",
        "Choose another variant, or update QwenImageTool. Nothing was fetched in its place.",
    )


def _kept(file: RemoteFile, path: str, listing: Listing) -> Kept:
    """Raises DownloadFailed where nothing would prove that the file came whole."""
    kept = Kept(
        path=path,
        repo=listing.repo,
        revision=listing.revision,
        source=file.path,
        size=file.size,
        sha256=file.sha256,
        git_sha1=file.git_sha1,
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _is(path: Path, file: Kept) -> bool:
    """Whether the content of `path` is proven to be that of `file`."""
    try:
        return (
            _size(path) == file.size and bool(file.identity) and digest_file(path, file)[0].agrees
        )
    except OSError:
        return False


def _link(source: Path, own: bool, target: Path, partial: Path) -> bool:
    """Give `target` the content of `source` without a second copy. Where the disk has no hard
    links, a file of another program is linked to; one of ours is not, because it may be deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    for link in (os.link,) if own else (os.link, os.symlink):
        partial.unlink(missing_ok=True)
        try:
            link(source, partial)
        except OSError:
            continue
        partial.replace(target)
        return True
    return False


def _delete(path: Path) -> int:
    """Bytes that became free: none where another name for the content is left."""
    found = path.lstat()
    path.unlink()
    return found.st_size if found.st_nlink == 1 and not path.is_symlink() else 0


@contextmanager
def _pausable(folder: Path, control: Control) -> Iterator[None]:
    """Pause when another process leaves the sign to."""
    sign = folder / PRIVATE / "pause"
    sign.unlink(missing_ok=True)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(PAUSE_POLL):
            if sign.exists():
                control.pause()
                return

    watcher = threading.Thread(target=watch, name="pause", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        sign.unlink(missing_ok=True)
