"""The models of this computer: get, prove, mend and delete them.

One folder a model in the diffusers layout. Files that several models share (Turbo's text encoder is
2.1's) are hard links to one content, so each folder is whole and the disk holds it once.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from qwen_image_tool.catalog import Catalog, Model
from qwen_image_tool.errors import (
    BadRequest,
    Cancelled,
    DownloadFailed,
    LicenceNotAccepted,
    ModelBroken,
    ModelMissing,
)
from qwen_image_tool.store import updates, verify
from qwen_image_tool.store.download import Control, Effort, Progress, fetch, make_room, to_come
from qwen_image_tool.store.formats import (
    NOT_TAKEN,
    RUNNING,
    WORDS,
    Checkpoint,
    fits,
    recognise,
)
from qwen_image_tool.store.hub import Hub
from qwen_image_tool.store.imports import check_importable, take
from qwen_image_tool.store.licences import Accepted, Licences
from qwen_image_tool.store.links import content, delete, freed_by, link, names, size_of
from qwen_image_tool.store.locks import LOCK, ask_to_pause, is_locked, locked, pausable, writing
from qwen_image_tool.store.patience import Check
from qwen_image_tool.store.places import Elsewhere
from qwen_image_tool.store.published import (
    licence_text,
    list_files,
    model_files,
    pinned,
    variant_file,
)
from qwen_image_tool.store.record import (
    IMPORTED,
    OWN,
    PRIVATE,
    Kept,
    Record,
    digest_file,
    partial_path,
    read_record,
    transformer_folder,
    write_record,
)
from qwen_image_tool.store.verify import Fault
from qwen_image_tool.types import Event, Notice

BY_NOTE = ("transformer", "text_encoder", "variants")  # what the engine's own reader opens

Emit = Callable[[Event], None]


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
        self._licences = Licences(models / "licences")

    def folder(self, model: Model) -> Path:
        return self.models / model.id

    def record(self, model: Model) -> Record | None:
        """What was downloaded of `model`; None where nothing was. Raises ModelBroken."""
        return read_record(self.folder(model))

    def variants(self, model: Model) -> tuple[str, ...]:
        """Of its transformer, that were downloaded or imported; then another imported part."""
        record = _record_or_none(self.folder(model))
        return tuple(dict.fromkeys((*record.variants, *record.taken))) if record else ()

    def revision(self, model: Model) -> str:
        """The commit that was downloaded; "" where none was."""
        record = _record_or_none(self.folder(model))
        return record.revision(model.repo) if record else ""

    def usable(self, model: Model) -> tuple[Checkpoint, ...]:
        """Weight files of other programs that keys and shapes make parts of `model` which this
        version reads."""
        found = []
        for path in self._elsewhere.weight_files():
            try:
                each = recognise(path)
            except BadRequest:
                continue
            if each.kind not in NOT_TAKEN and fits(each, model) and not each.unsupported:
                found.append(each)
        return tuple(found)

    # -- download ----------------------------------------------------------------------------

    def download(
        self,
        model: Model,
        variant: str = "",
        emit: Emit = lambda _: None,
        control: Control | None = None,
        accept_licence: bool = False,
        again: bool = False,
        update: bool = False,
    ) -> Path:
        """Make `model` complete on this computer and return its folder.

        Goes on where an earlier download stopped, at the revision of that one, and links what the
        disk already has. Where a transformer was imported and no `variant` is named, the rest is
        fetched around that one. `again` deletes what was fetched first; `update` goes on to the
        hub's current revision: what is here stays until all that changes has come. Raises
        LicenceNotAccepted, DownloadFailed, Paused or Cancelled.
        """
        control = control or Control()
        name = self._variant_name(model, variant)
        _check_published(model)
        folder = self.folder(model)
        if again or update or not self._is_planned(_record_or_none(folder), model, name):
            self._check_licence(model, accept_licence, control.check)
        with locked(folder), pausable(folder, control):
            updates.finish(folder)
            if again:  # without a hub that answers, all would be gone
                list_files(self._connect(), model.repo, check=control.check)
                self._forget_fetched(folder)
            self._update(folder, model, name, update, emit, control)
            record = self._plan(folder, model, name, emit, control)
            self._finish(folder, record, model, emit, control)
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
        return to_come(folder, files) if files else None

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

    @staticmethod
    def _is_planned(record: Record | None, model: Model, name: str) -> bool:
        """Whether the record names all that `model` with the variant `name` needs."""
        if record is None or name not in record.variants:
            return False
        others = [part for part in model.components if part != "transformer"]
        return all(any(file.repo for file in record.within(part)) for part in others)

    def _plan(self, folder: Path, model: Model, name: str, emit: Emit, control: Control) -> Record:
        """The files to have with the variant `name`, pinned: an earlier record's stay as they are.
        Written to disk."""
        old = read_record(folder) or Record(model=model.id)
        if self._is_planned(old, model, name):
            return old
        record = self._recorded(model, old, (name,), False, control)
        self._distrust_strangers(folder, record, old, emit, control)
        write_record(folder, record)
        return record

    def _update(
        self, folder: Path, model: Model, name: str, look: bool, emit: Emit, control: Control
    ) -> None:
        """Fetch what a newer revision changes beside what is here, then put it in place: the hub's
        current one where that is to be looked for, else one whose update was stopped, if any."""
        old, place = read_record(folder), updates.stage(folder)
        new = None if look else read_record(place)
        if old is None or not (look or new):
            return
        if new is None:
            new = self._recorded(model, old, (*old.variants, name), True, control)
            updates.begin(folder, new)
        emit(Notice(text=_what_changes(model, old, new)))
        coming = Record(model=model.id, files=updates.changes(old, new))
        try:
            make_room(folder, coming.files)
            self._complete(place, coming, emit, control)
        except Cancelled:
            updates.discard(folder)
            raise
        updates.put_in_place(folder)

    def _recorded(
        self, model: Model, old: Record, wanted: tuple[str, ...], update: bool, control: Control
    ) -> Record:
        """`old` with the published files of the variants `wanted`; unless `update`, none that it
        has is another after that."""
        files = {file.path: file for file in self._published(model, old, wanted, update, control)}
        files |= {file.path: file for file in old.files if not update or not file.repo}
        return Record(
            model=model.id,
            variants=tuple(dict.fromkeys((*old.variants, *wanted))),
            files=tuple(files[path] for path in sorted(files)),
        )

    def _published(
        self,
        model: Model,
        old: Record,
        variants: Iterable[str],
        update: bool,
        control: Control,
    ) -> Iterator[Kept]:
        """The hub's files of these variants, but for what other programs' files stand for."""
        hub = self._connect()
        revision = self._revision(hub, model, old, update)
        listing = list_files(hub, model.repo, revision, control.check)
        if revision in ("", model.revision):  # an earlier download may be of another revision
            listing = pinned(listing, model.pinned)
        for name in dict.fromkeys(variants):
            yield from model_files(model, listing, name, old.parts)
            if name not in old.imported and (variant := model.variant(name)):
                commit = variant.revision if hub.kind == "huggingface" else ""
                found = list_files(hub, variant.repo, commit, control.check)
                yield variant_file(variant, found)

    @staticmethod
    def _revision(hub: Hub, model: Model, old: Record, update: bool) -> str:
        """The earlier download's, else the catalogue's, which is Hugging Face's; "" is the hub's
        current one. A commit of one hub is unknown to the other."""
        for file in old.files:
            if file.repo == model.repo and file.hub == hub.kind and not update:
                return file.revision
        return model.revision if hub.kind == "huggingface" else ""

    @staticmethod
    def _distrust_strangers(
        folder: Path, record: Record, old: Record, emit: Emit, control: Control
    ) -> None:
        """Files that somebody put there are proven before they count; wrong ones make room."""
        known = {file.path for file in old.files}
        found = [file for file in record.files if file.path not in known]
        found = [file for file in found if content(folder / file.path).is_file()]
        size = sum(size_of(folder / file.path) for file in found)
        if found:
            emit(Notice(text=f"{folder} has {len(found)} of the files: they are looked at."))
        count = verify.Count(record.model, size, emit, control.check)
        for file in found:
            if not _is(folder / file.path, file, count):
                delete(folder / file.path)

    def _finish(
        self, folder: Path, record: Record, model: Model, emit: Emit, control: Control
    ) -> None:
        """Fetch what is missing, then look at it all. Raises DownloadFailed, Paused, Cancelled."""
        try:
            self._complete(folder, record, emit, control)
        except Cancelled:
            shutil.rmtree(folder / PRIVATE / "partial", ignore_errors=True)
            raise
        shutil.rmtree(folder / PRIVATE / "partial", ignore_errors=True)
        if faults := verify.quick(folder, record, model.components):
            hint = f"Then `qit models repair {model.id}` looks at every byte."
            raise DownloadFailed("hash", faults[0].message, hint)

    def _complete(self, folder: Path, record: Record, emit: Emit, control: Control) -> None:
        progress = Progress(record.model, sum(file.size for file in record.files), emit)
        wanted = []
        for file in record.files:
            if size_of(folder / file.path) == file.size:
                progress.have(file.size, file.path)
            else:
                wanted.append(file)
        make_room(folder, wanted)
        left = list(self._adopt(folder, wanted, progress, emit, control))
        self._point_out(record, left, emit)
        for file in left:
            if not file.repo:
                raise DownloadFailed(
                    "not found",
                    f"{folder / file.path} was imported from {file.source}, which is not that file"
                    " any more.",
                    f"Import it again, or give it up with `qit models remove {record.model}"
                    f" --variant {record.taken_as(file)}`.",
                )
        while left:  # equal files (a tokenizer's, in the processor too) wait under one name
            once = list({file.identity or file.path: file for file in left}.values())
            fetch(self._connect(), folder, once, progress, control, self._effort)
            rest = [file for file in left if file not in once]
            left = list(self._adopt(folder, rest, progress, emit, control))

    def _adopt(
        self,
        folder: Path,
        wanted: Iterable[Kept],
        progress: Progress,
        emit: Emit,
        control: Control,
    ) -> Iterator[Kept]:
        """Link what this disk has already; yields what it has not."""

        def proven(path: Path, file: Kept) -> bool:
            tell = emit if file.size >= verify.REPORT_EVERY else (lambda _: None)
            if size_of(path) == file.size:
                tell(Notice(text=f"{path} may be {file.path}: its hash is looked at."))
            return _is(path, file, verify.Count(progress.model, file.size, tell, control.check))

        wanted = list(wanted)
        ours = self._our_files()
        foreign = self._elsewhere.by_size() if wanted else {}
        for file in wanted:
            control.check()
            partial = partial_path(folder, file)
            candidates = [(path, True) for path in ours.get(file.identity, ())]
            candidates += [] if file.repo else [(Path(file.source), False)]
            candidates += [(path, False) for path in foreign.get(file.size, ())]
            source = next(((p, own) for p, own in candidates if proven(p, file)), None)
            if source is None or not link(*source, folder / file.path, partial, _by_note(file)):
                yield file
                continue
            progress.have(file.size, file.path)
            if file.is_weights:
                emit(Notice(text=f"{file.path}: already on this computer ({source[0]})."))

    def _point_out(self, record: Record, left: Iterable[Kept], emit: Emit) -> None:
        """Weights that are about to be fetched, and may be here in another program's file."""
        places = {file.path.split("/")[0] for file in left if file.is_weights}
        for found in self.usable(self.catalog.find(record.model)) if places else ():
            if found.kind in places:
                text = f"{found.path} may be its {WORDS[found.kind]}: keys and shapes fit."
                way = f'`qit models import "{found.path}" --as {record.model}`'
                emit(Notice(text=f"{text} If it is, stop this, and {way} uses it where it lies."))

    def _our_files(self) -> dict[str, list[Path]]:
        """The other models' files by content."""
        found: dict[str, list[Path]] = {}
        for model in self.catalog.models:
            record = _record_or_none(self.folder(model))
            for file in record.files if record else ():
                path = self.folder(model) / file.path
                if file.identity and size_of(path) == file.size:
                    found.setdefault(file.identity, []).append(path)
        return found

    # -- licence -----------------------------------------------------------------------------

    def licence_text(self, model: Model, check: Check = lambda: None) -> str:
        """The licence's own text from the model's repository; its name and address where the
        repository has none. Raises DownloadFailed, and what `check` does."""
        licence, hub = self.catalog.licence_of(model), self._connect()
        revision = self._revision(hub, model, Record(model=model.id), update=True)
        text = licence_text(hub, list_files(hub, model.repo, revision, check), check)
        return text or f"{licence.name}\n{licence.url}"

    def accepted(self, model: Model) -> Accepted | None:
        """The wording of the model's licence that was agreed to last."""
        found = self._licences.accepted(model.licence)
        return found[-1] if found else None

    def _check_licence(self, model: Model, accept: bool, check: Check) -> None:
        """Free ones need nothing; of others each wording is agreed to. Raises
        LicenceNotAccepted."""
        licence, known = self.catalog.licence_of(model), self._licences.accepted(model.licence)
        if licence.commercial:
            return
        if not known and not accept:
            raise LicenceNotAccepted(
                f"{model.name} is under the {licence.name}, which allows no commercial use:"
                f" {licence.url}.",
                "Read it, and add --yes-license if you agree.",
            )
        text = self.licence_text(model, check)
        if text in [each.text for each in known]:
            return
        if not accept:
            raise LicenceNotAccepted(
                f"The {licence.name} of {model.name} reads otherwise than when you agreed to it on"
                f" {known[-1].at:%Y-%m-%d}: {licence.url}.",
                "Read it again, and add --yes-license if you agree.",
            )
        with writing(self.models):
            self._licences.remember(model.licence, licence, text)

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
        if record is None and not any(path.name != PRIVATE for path in folder.iterdir()):
            raise self._missing(model)  # a download that ended before its first byte
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
        folder = self._existing(model)
        with locked(folder):
            updates.finish(folder)
        faults = self.verify(model, full, emit, control.stopped.is_set)
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
        broken = {fault.path for fault in faults if fault.path in known}
        with locked(folder), pausable(folder, control):
            make_room(folder, [file for file in record.files if file.path in broken])
            for path in broken:
                delete(folder / path)
            self._finish(folder, record, model, emit, control)
        return faults

    def remove(self, model: Model, variant: str = "") -> int:
        """Delete `model`, or one variant of it; returns the bytes that became free. What another
        model shares stays with that one, and with a variant nothing else goes, be it the last.
        Raises ModelMissing, and BadRequest for a variant that is not here."""
        folder = self._existing(model)
        name = self._here(model, variant) if variant else ""
        with locked(folder):
            freed = self._remove_variant(folder, name) if name else self._clear(folder)
            is_empty = all(path.name == PRIVATE for path in folder.iterdir())
        if is_empty:
            shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _here(self, model: Model, variant: str) -> str:
        """A variant that is here, by its own name. Raises BadRequest."""
        here = self.variants(model) if _record_or_none(self.folder(model)) else (OWN,)
        name = variant if variant in here else self._variant_name(model, variant)
        if name not in here:
            raise BadRequest(
                f"Of {model.name} no {name} is here.", f"Here is: {', '.join(here) or 'none'}."
            )
        return name

    def _remove_variant(self, folder: Path, name: str) -> int:
        updates.finish(folder)
        updates.discard(folder)  # its record knows the variant
        record = _record_or_none(folder)
        if record is None:
            return self._clear(folder / transformer_folder(name))
        left = self._without(record, name)
        gone = {folder / file.path for file in record.files if file not in left.files}
        write_record(folder, left)
        freed = sum(delete(path) for path in gone)
        for place in {path.parent for path in gone}:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        return freed

    def frees(self, model: Model) -> tuple[int, int]:
        """Bytes that removing all of `model` makes free, and those of its files that others keep:
        another model, or the program whose files they are. Raises ModelMissing."""
        paths = [path for path in self._existing(model).rglob("*") if path.is_file()]
        freed = freed_by(paths)
        return freed, sum(path.stat().st_size for path in paths) - freed

    def free_bytes(self) -> int:
        """Of the disk that the models folder is on, or will be."""
        found = (self.models, *self.models.absolute().parents)
        return shutil.disk_usage(next(path for path in found if path.exists())).free

    def used_bytes(self) -> int:
        """What the models folder takes, each content once."""
        found = (path for path in self.models.rglob("*") if not path.is_symlink())
        sizes = {}
        for path in found:
            with suppress(OSError):
                stat = path.stat()
                sizes[stat.st_dev, stat.st_ino] = 0 if path.is_dir() else stat.st_size
        return sum(sizes.values())

    @staticmethod
    def _without(record: Record, variant: str) -> Record:
        """The record without a variant, or an imported part."""
        part = variant.removeprefix(IMPORTED)
        start = (part if part in record.parts else transformer_folder(variant)) + "/"
        files = tuple(file for file in record.files if not file.path.startswith(start))
        names = tuple(name for name in record.variants if name != variant)
        return Record(model=record.model, variants=names, files=files)

    def pause(self, model: Model) -> None:
        """Ask the process that downloads `model` to stop; it does within a second or so. Raises
        ModelMissing, and BadRequest where none does."""
        folder = self._existing(model)
        if not is_locked(folder):
            raise BadRequest(
                f"No download of {model.name} is running.",
                f"`qit models download {model.id}` starts one or goes on with it.",
            )
        ask_to_pause(folder)

    def import_file(
        self,
        path: Path,
        model: Model,
        emit: Emit = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Path:
        """Take another program's file for `model`, as `imports.take`; `download` then fetches what
        the model needs beside it."""
        _check_published(model)
        check_importable(path, model)
        folder = self.folder(model)
        with locked(folder):
            updates.finish(folder)
            updates.discard(folder)  # its record does not know the file
            return take(path, model, folder, emit, verify.check_cancelled(is_cancelled))

    def _existing(self, model: Model) -> Path:
        _check_published(model)
        folder = self.folder(model)
        if not folder.is_dir():
            raise self._missing(model)
        return folder

    def _missing(self, model: Model) -> ModelMissing:
        known = self._elsewhere.snapshots(model.repo)
        cache = "takes over the one in the Hugging Face cache, by its hashes." if known else ""
        return ModelMissing(
            f"{model.name} is not in {self.models}.",
            f"`qit models download {model.id}` {cache or 'gets it.'}",
        )

    def _forget_fetched(self, folder: Path) -> None:
        """Delete all but what was imported: nobody could bring that back."""
        record = _record_or_none(folder)
        imported = tuple(file for file in record.files if not file.repo) if record else ()
        self._clear(folder, [name for file in imported for name in names(folder / file.path)])
        if record and imported:
            write_record(folder, Record(model=record.model, files=imported))

    @staticmethod
    def _clear(folder: Path, keep: Iterable[Path] = ()) -> int:
        """Empty a model's folder but for `keep` and the lock that we hold."""
        kept, freed = {folder / LOCK, *keep}, 0
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                freed += delete(path)
        return freed


def _by_note(file: Kept) -> bool:
    """Whether all that read the file follow notes: diffusers and transformers do not."""
    return file.is_weights and file.path.split("/")[0] in BY_NOTE


def _what_changes(model: Model, old: Record, new: Record) -> str:
    before, after = old.revision(model.repo), new.revision(model.repo)
    changed = updates.changes(old, new)
    gone = {file.path for file in old.files} - {file.path for file in new.files}
    if not changed and not gone:
        return f"{model.name} is at the current revision, {after}."
    size = sum(file.size for file in changed)
    return (
        f"{model.name} goes from revision {before or 'none'} to {after}: {len(changed)} files"
        f" change. What is here stays until they have come ({size / 1e9:.2f} GB)."
    )


def _check_published(model: Model) -> None:
    if not model.repo:
        raise BadRequest(
            f"{model.name} comes with the program.",
            "There is nothing to download, check or delete: it is part of the installation.",
        )


def _record_or_none(folder: Path) -> Record | None:
    """For what has to work beside a record that can't be read: lists, other models, a new start."""
    try:
        return read_record(folder)
    except ModelBroken:
        return None


def _is(path: Path, file: Kept, count: verify.Count) -> bool:
    """Whether the content of `path` is proven to be that of `file`."""
    try:
        return (
            size_of(path) == file.size
            and bool(file.identity)
            and digest_file(content(path), file, lambda n: count.add(n, file.path))[0].agrees
        )
    except OSError:
        return False
