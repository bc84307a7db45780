"""Composition root: the only place that puts the parts together. Faces call this."""

import importlib.metadata
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_tool import __version__, device, doctor, gallery, planner, store
from qwen_image_tool.catalog import Model, load_catalog
from qwen_image_tool.errors import BadRequest, CannotRun, ToolError, TroubleKind, memory_told
from qwen_image_tool.files import DiskMeter
from qwen_image_tool.gallery.infotext import recalled
from qwen_image_tool.libraries import LibraryFiles
from qwen_image_tool.rates import RateBook
from qwen_image_tool.settings import Settings
from qwen_image_tool.store.ahead import Wanted, read_ahead
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.places import Elsewhere, hugging_face_cache, other_programs
from qwen_image_tool.types import (
    Device,
    Event,
    ImageFile,
    Notice,
    PhaseStarted,
    Plan,
    Rates,
    Request,
    Result,
    Saved,
    Size,
    Value,
)

if TYPE_CHECKING:
    from qwen_image_tool.engine.engine import Engine
    from qwen_image_tool.store.hub import Hub

LAST_LOOK = "device.json"  # in the cache
SEEDS = 2**32  # random seeds stay short enough to read out


class Advice(Value):
    """A variant of a model for one machine. `to_fetch`: bytes a download would take. `seconds` of
    a picture with the model's own settings, loading included, where the device's rates are known;
    `ram_bytes` and `vram_bytes` at its peak. `fits_disk`: whether it can be fetched as the disk is
    now."""

    model: str
    variant: str
    released: str
    runs: bool
    reason: str
    to_fetch: int
    seconds: float | None = None
    ram_bytes: int = 0
    vram_bytes: int = 0
    fits_disk: bool = True


BF16_ALONE = (
    "This version runs bf16 alone: smaller storage (GGUF, fp8) can be fetched, and does not run"
    " yet."
)


def never() -> bool:
    return False


class App:
    """Everything the faces can ask for. Heavy parts load at their first use."""

    def __init__(self, settings: Settings, previews: bool = False) -> None:
        """`previews`: emit what a picture looks like while it is drawn."""
        self.settings = settings
        self._previews = previews
        self.catalog = load_catalog()
        self._engine: Engine | None = None
        self._device: Device | None = None
        named = settings.other_models.split(os.pathsep) if settings.other_models else ()
        folders = (*other_programs(), *(Path(name).expanduser() for name in named))
        self.elsewhere = Elsewhere(hugging_face_cache(), folders)
        self.rates = RateBook(settings.cache / "rates")
        self.library = Library(self.catalog, settings.models, self._hub, self.elsewhere)

    def _hub(self) -> "Hub":
        from qwen_image_tool.store.hub import connect

        return connect(self.settings.source, self.settings.local_hub)

    def _locate(self, reference: str) -> store.Installed:
        return store.locate(reference, self.catalog, self.settings.models, self.elsewhere)

    def resolve(self, request: Request, installed: store.Installed) -> Request:
        """The request with every choice filled in. Raises BadRequest."""
        return installed.model.resolve(request, secrets.randbelow(SEEDS))

    def ready(self, request: Request) -> Request:
        """The request resolved for a model that is on disk. Raises BadRequest or ModelMissing."""
        return self.resolve(request, self._locate(request.model))

    def model(self, reference: str) -> Model:
        """The catalogue's row of an id, or the one made for a local folder. Raises BadRequest."""
        known = self.catalog.get(reference)
        return known or self._locate(reference).model

    def describe(self, model: Model, on: Device | None = None) -> dict[str, Any]:
        """One line of a model list. `state`: "ready", "not here" or "not yet". `needs`: its best
        variant on a machine; None where that is not given, or the model can't run yet."""
        state, why, found = "ready", "", None
        try:
            found = self._locate(model.id)
        except ToolError as error:
            state = "not yet" if model.unsupported else "not here"
            why = str(error)
        licence = self.catalog.licence_of(model)
        advice = self._advise(model, on, found) if on and not model.unsupported else None
        return {
            "id": model.id,
            "name": model.name,
            "tasks": list(model.does),
            "bytes": model.weight_bytes,
            "licence": model.licence,
            "commercial": licence.commercial,
            "to_fetch": 0 if state == "ready" else self.library.to_fetch(model),
            "state": state,
            "why": why,
            "variants": list(self.library.variants(model)),
            "revision": self._revision(model, found),
            "needs": advice and advice.model_dump(mode="json"),
        }

    def _revision(self, model: Model, found: store.Installed | None) -> str:
        """The commit that is here; a snapshot of the Hugging Face cache is named by it."""
        own = self.library.revision(model)
        is_snapshot = found is not None and found.folder.parent.name == "snapshots"
        return found.folder.name if found and is_snapshot and not own else own

    def plan(self, request: Request, on: Device | None = None) -> tuple[Request, Plan]:
        """The first of `plans`."""
        resolved, found = self.plans(request, on)
        return resolved, found[0]

    def plans(
        self, request: Request, on: Device | None = None, anyway: bool = False
    ) -> tuple[Request, tuple[Plan, ...]]:
        """What the request would do on this machine (read in a child process), or `on` another; and
        what would be tried after that. `anyway`: as planner.plans.

        A model of the catalogue need not be on disk.
        """
        installed = store.expect(request.model, self.catalog, self.settings.models, self.elsewhere)
        resolved = self.resolve(request, installed)
        where = on or self.here()
        return resolved, planner.plans(resolved, installed, where, anyway)

    def recommend(self, on: Device | None = None) -> tuple["Advice", ...]:
        """For every model this version runs, its best variant on this machine (or `on` another),
        the planner's reason and what getting it takes; the best model first."""
        where = on or self.here()
        advice = [
            self._advise(model, where, self._found(model))
            for model in self.catalog.models
            if model.repo and not model.unsupported
        ]
        return tuple(sorted(advice, key=_rank))

    def _found(self, model: Model) -> store.Installed | None:
        try:
            return self._locate(model.id)
        except BadRequest:
            return None

    def _advise(self, model: Model, where: Device, here: store.Installed | None) -> "Advice":
        """What is here, where it runs; else the largest variant that can run, because it is nearest
        to what was published."""
        why = ""
        request = model.resolve(Request(model=model.id, prompt="a prompt"), seed=0)
        for name, installed in self._choices(model, here):
            try:
                found = planner.plan(request, installed, where)
            except CannotRun as error:
                why = why or str(error)
                continue
            return self._advice(model, name, found, found.reasons[0], here is not None)
        return self._advice(model, "bf16", None, why, here is not None)

    def _limits(self, model: Model, to_fetch: int) -> Iterator[str]:
        """What the recommendation has to do without, and what is in its way."""
        published = model.components["transformer"].bytes
        smaller = [variant for variant in model.variants if variant.bytes < published]
        if smaller and all(variant.unsupported for variant in smaller):
            yield BF16_ALONE
        free = self.library.free_bytes()
        if to_fetch > free:
            yield (
                f"{to_fetch / 1e9:.1f} GB are to be fetched, and {free / 1e9:.1f} GB of the disk"
                " are free: free some space first, or move the models."
            )

    @staticmethod
    def _choices(
        model: Model, here: store.Installed | None
    ) -> Iterator[tuple[str, store.Installed]]:
        if here:
            yield here.variant, here
        if model.repo:
            sizes = {"bf16": model.components["transformer"].bytes}
            sizes |= {v.id: v.bytes for v in model.variants if not v.unsupported}
            for name in sorted(sizes, key=lambda name: -sizes[name]):
                yield name, store.as_published(model, transformer_bytes=sizes[name])

    def _advice(
        self, model: Model, variant: str, plan: Plan | None, reason: str, is_here: bool
    ) -> "Advice":
        to_fetch = 0 if is_here else self.library.to_fetch(model, variant)
        limits = self._limits(model, to_fetch) if plan else ()
        return Advice(
            model=model.id,
            variant=variant,
            released=model.released,
            runs=plan is not None,
            reason=" ".join((reason, *limits)),
            fits_disk=to_fetch <= self.library.free_bytes(),
            seconds=plan.seconds if plan else None,
            ram_bytes=plan.ram_bytes if plan else 0,
            vram_bytes=plan.vram_bytes if plan else 0,
            to_fetch=to_fetch,
        )

    def is_ready(self, model: Model) -> bool:
        """Whether it is on disk, whole as far as a quick look shows."""
        return self._found(model) is not None

    def generate(
        self,
        request: Request,
        emit: Callable[[Event], None],
        is_cancelled: Callable[[], bool] = never,
        output: Path | None = None,
        ram_bytes: int | None = None,
        vram_bytes: int | None = None,
        anyway: bool = False,
        job: str = "",
        tried: int = 0,
        trouble: TroubleKind = "other",
    ) -> Result:
        """Make and save the pictures. What can be refused is refused before any weight is read;
        where the memory runs out, the planner's fallbacks are tried, each once.

        `ram_bytes`, `vram_bytes`: use no more of the free memory than this. `anyway`: as
        planner.plans. `job` is written into the pictures. `tried`: the number of the plan that
        failed by `trouble` in another process. Raises ToolError. A picture that was saved is whole
        and stays.
        """
        installed = self._locate(request.model)
        resolved = self.resolve(request, installed)
        folder = output or self.settings.output
        created = gallery.check_output(folder, planner.disk_bytes(resolved))
        if created:
            emit(Notice(text=created))

        # The disk works from here on, while Python imports its libraries, until all is loaded
        disk = DiskMeter()
        with ExitStack() as reading:

            def heard(event: Event) -> None:
                if isinstance(event, PhaseStarted) and event.phase == "denoise":
                    reading.close()
                emit(event)

            def planned() -> tuple[Device, tuple[Plan, ...]]:
                found = self._device_for(installed, emit, reading, disk)
                here = found.within(ram_bytes, vram_bytes)
                return here, planner.plans(resolved, installed, here, anyway)

            try:
                here, plans = planned()
            except CannotRun:  # as the memory was when the engine was made; it may be free by now
                self._forget_engine()
                here, plans = planned()
            if tried:
                plans = planner.plans_after(plans, tried, trouble)
            for reason in plans[0].reasons:
                emit(Notice(text=reason))
            assert self._engine
            run = self._engine.run(resolved, plans, heard, is_cancelled, disk)
        self.rates.learn(here, **run.rates, **disk.rates)

        emit(PhaseStarted(phase="save"))
        started = time.perf_counter()
        versions = library_versions()
        files = []
        for index, image in enumerate(run.images):
            alone = resolved.for_image(index)
            path = gallery.save_image(
                image, folder, alone, run.plan, versions, installed.model.name, job
            )
            emit(Saved(path=str(path), seed=alone.seeds[0]))
            files.append(ImageFile(path=str(path), seed=alone.seeds[0], size=Size(*image.size)))
        seconds = run.seconds | {"save": time.perf_counter() - started}
        return Result(
            request=resolved,
            plan=run.plan,
            images=tuple(files),
            seconds=seconds,
            versions=versions,
        )

    def _device_for(
        self,
        installed: store.Installed,
        emit: Callable[[Event], None],
        reading: ExitStack,
        disk: DiskMeter,
    ) -> Device:
        """The machine as it was before the engine took memory; a new engine for another model, or
        for other files of it, whose weights are read ahead while `reading` is open."""
        if not (self._engine and self._device and self._engine.is_of(installed)):
            self._forget_engine()
            libraries = LibraryFiles(self.settings.cache / "libraries.json", library_versions())
            reading.enter_context(libraries.imported())
            weights = reading.enter_context(ExitStack())
            weights.enter_context(read_ahead(_wanted(installed), disk))
            with memory_told("Close other programs; on Windows make the page file larger, too."):
                from qwen_image_tool.engine.engine import Engine
                from qwen_image_tool.engine.probe import torch_facts

                facts = torch_facts()
            self._engine = Engine(installed, self.settings.cache, self._previews)
            self._device = self._measured(device.probe(facts), emit, weights)
        return self._device

    def _forget_engine(self) -> None:
        if self._engine:
            self._engine.release()
        self._engine = None

    def here(self) -> Device:
        """This machine, read in a child process, with what it was measured to do before. Raises
        ToolError where torch can't be used."""
        return self.with_rates(device.probe(self.look()))

    def look(self) -> device.TorchFacts:
        """What torch says of this machine, asked in a child process and remembered."""
        return device.look(self.settings.cache / LAST_LOOK)

    def seen(self) -> Device | None:
        """This machine as it was at the last look, the RAM that is free as it is now: known without
        torch. None where there was no look since the machine was started."""
        facts = device.last_look(self.settings.cache / LAST_LOOK)
        return self.with_rates(device.probe(facts)) if facts else None

    def with_rates(self, found: Device) -> Device:
        """`found`, with what it was measured to do before."""
        return found.with_rates(self.rates.get(found) or Rates())

    def _measured(self, found: Device, emit: Callable[[Event], None], reading: ExitStack) -> Device:
        """`found` with its rates, which are measured where they are not known yet, after the
        `reading` beside it is ended."""
        from qwen_image_tool.engine.measure import measure

        rates = self.rates.get(found)
        if rates is None:
            reading.close()
            emit(Notice(text=f"Measuring once how fast {found.name} is."))
            rates = measure(found, self.settings.cache / "compiled")
            if rates.matmul:
                self.rates.put(found, rates)
        return found.with_rates(rates)

    def fields_of(self, info: gallery.ImageInfo) -> dict[str, Any]:
        """Fields of a new request like the picture's, as JSON; of another program's picture those
        that its text tells of. Its model is there only where the catalogue knows it."""
        if info.request:
            return info.request.model_dump(mode="json")
        fields = recalled(info.parameters)
        name = fields.pop("model", "")
        known = (model.id for model in self.catalog.models if name in (model.id, model.name))
        if model := next(known, None):
            fields["model"] = model
        return {name: str(v) if name == "size" else v for name, v in fields.items()}

    def clear_cache(self) -> None:
        """Forget what can be made again: embeddings of known prompts, modulation of schedules, what
        was compiled, what devices were measured to do."""
        for name in ("embeddings", "modulation", "compiled", "rates"):
            shutil.rmtree(self.settings.cache / name, ignore_errors=True)
        (self.settings.cache / LAST_LOOK).unlink(missing_ok=True)

    def examine(self, again: bool = True) -> tuple[doctor.Check, ...]:
        """Is this machine ready? Torch is asked, which takes seconds; unless `again`, only where it
        was not asked since the machine was started."""
        known = None if again else device.last_look(self.settings.cache / LAST_LOOK)
        return doctor.examine(doctor.gather(self.settings, known or self.look()))


def _rank(advice: Advice) -> tuple[bool, bool, bool, int]:
    """The newest of those that run, that the disk has room for, and that the GPU draws where there
    is one: the CPU takes hours."""
    newest = -int(advice.released.replace("-", ""))
    return not advice.runs, not advice.fits_disk, not advice.vram_bytes, newest


def made_otherwise(original: gallery.ImageInfo, result: Result) -> str:
    """What the original was made with that this result was not; "" where all agrees."""
    changes = [
        f"{name} {version}"
        for name, version in original.versions.items()
        if result.versions.get(name) != version and name != "qwen_image_tool"
    ]
    if original.plan and original.plan.device != result.plan.device:
        changes.append(f"the device {original.plan.device}")
    if original.plan and original.plan.dtype != result.plan.dtype:
        changes.append(original.plan.dtype)
    return ", ".join(changes)


def _wanted(installed: store.Installed) -> tuple[Wanted, ...]:
    """What a run reads; last what a known prompt and a known schedule do without."""
    modulation = "_mod."  # of the 20B family's blocks
    return (
        Wanted(installed.transformer, without=modulation),
        Wanted(installed.folder / "text_encoder", ".layers."),
        Wanted(installed.transformer, modulation),
    )


def library_versions() -> dict[str, str]:
    """What a picture's pixels depend on."""
    libraries = ("torch", "diffusers", "transformers")
    found = {name: importlib.metadata.version(name) for name in libraries}
    return {"qwen_image_tool": __version__, **found}
