"""What a run takes, phase by phase: memory, reads from disk, seconds. Pure arithmetic.

Every sum is over what the engine holds at that time; the constants are catalog/costs.json's.
"""

import math
from dataclasses import dataclass
from typing import Literal

from qwen_image_tool.catalog.costs import load_costs
from qwen_image_tool.decoding import DECODINGS
from qwen_image_tool.store import Blocks, Installed
from qwen_image_tool.types import Device, PhaseName, PhaseNeed, Placement, Rates, Request

PHASES: tuple[PhaseName, ...] = ("load", "encode", "denoise", "decode")
TEMPLATE_TOKENS = 10  # around a prompt, beside the leading ones that the transformer never sees
LEADING_TOKENS = 34  # which the text encoder does see
BYTES_PER_TOKEN = 3  # of a prompt in UTF-8: fewer than in most languages, so more tokens than most
PIXEL_RAM = 32  # bytes a pixel, from the decoder's numbers to a PNG
PASSING = 2  # buffers that weights pass through on their way to where they stay
# What a device computes in the time of one byte from its memory, where that was not measured
CPU_FLOP_PER_BYTE, GPU_FLOP_PER_BYTE = 20, 250
# Products on a CPU wait for their weights, as long as so many rows more would take: so blocks of
# both families came within 10 % on two cores of an EPYC, at 256 to 768 pixels a side
CPU_ROWS = 30


@dataclass(frozen=True)
class Way:
    """What a planner decides on: where the parts are and how they are computed."""

    device: str
    dtype: Literal["bfloat16", "float32"]
    blocks: Placement
    text: Placement
    single_frame: bool = True  # our decoder, which has strips; else diffusers' own, for its bits
    strips: int = 1
    compiled: bool = False
    attention: str = ""


class Needs:
    """The needs of a resolved request for a model on a device, for each way it may go."""

    def __init__(self, request: Request, installed: Installed, device: Device) -> None:
        if request.size is None or request.steps is None:
            raise ValueError("the request is not resolved")
        model, self.costs = installed.model, load_costs()
        self.request, self.installed, self.device = request, installed, device
        self.working = request.size.rounded_up(model.sizes.multiple)
        self.steps, self.exact = request.steps, request.mode == "exact"
        self._family = self.costs.families[model.family]
        self._caches_text = model.family == "qwen-image-2.1"
        side = model.sizes.multiple // (2 if self._caches_text else 1)
        self._tokens = self.working.pixels // side**2
        prompts = [request.prompt, request.negative_prompt]
        self._prompts = [self._text_tokens(p) for p in prompts if p is not None]
        self.most_strips = DECODINGS[installed.model.family].most_strips(self.working)
        self.passes = request.images * len(self._prompts)  # through the transformer, a step

    # What the choice turns on

    def bytes_per_step(self, way: Way) -> int:
        """Weights that cross to the device at each step, for all pictures and CFG halves."""
        return _streamed(way.blocks) * self.installed.blocks.bytes * _widened(way)

    def disk_bytes_per_step(self, way: Way) -> int:
        """Those of them that are read from disk."""
        return way.blocks.streamed("disk") * self.installed.blocks.bytes

    def drawing_bytes(self, way: Way) -> int:
        """Device memory that the steps take and give back: the slots, the streams in lockstep, and
        the block that is computed."""
        family, hidden = self._family, self._hidden_bytes(way)
        streams = family.held * self.passes + family.working
        slots = _widened(way) * way.blocks.slots * self.installed.blocks.bytes
        return slots + int(streams * hidden) + self._workspace(way)

    def decoding_bytes(self, way: Way) -> int:
        """Device memory that the VAE takes beside weights, for one picture."""
        model = self.installed.model
        decoding = DECODINGS[model.family]
        share = model.decode_bytes_per_pixel / decoding.whole * _widened(way)
        taken = float(self.working.pixels * decoding.whole)  # with all its kernels take
        if way.single_frame:
            taken = decoding.bytes(self.working, way.strips) * self._family.decode_slack
        return int(taken * share) + self._workspace(way)

    def step_seconds(self, way: Way) -> float | None:
        """Computing and copying run beside each other. None where a rate is not known."""
        computing = self._computing(way)
        copying = self.copying_seconds(way)
        if computing is None or copying is None:
            return None
        return max(computing + self._reading(way), copying)

    def copying_seconds(self, way: Way) -> float | None:
        """What the copies of a step take by themselves."""
        return self._copying(way.blocks, self.installed.blocks.bytes * _widened(way), way)

    def denoise_seconds(self, way: Way) -> float | None:
        step = self.step_seconds(way)
        return None if step is None else self.steps * step + self.compile_seconds(way)

    def compile_seconds(self, way: Way) -> float:
        known = self._rates(way).compile_seconds
        return (known or self.costs.compile_seconds) if way.compiled else 0.0

    def memory(self, way: Way) -> dict[PhaseName, tuple[int, int]]:
        """Bytes of RAM and of GPU memory at each phase's peak."""
        device, host, on_cpu = self._device_bytes(way), self._host_bytes(way), way.device == "cpu"
        own = self.costs.process_bytes["cpu" if on_cpu else "gpu"]
        context = 0 if way.device == "mps" else self.costs.context_bytes
        if on_cpu:
            return {name: (own + host[name] + device[name], 0) for name in PHASES}
        return {name: (own + host[name], context + device[name]) for name in PHASES}

    def phases(self, way: Way) -> tuple[PhaseNeed, ...]:
        """Everything, in the order of time."""
        reads, seconds = self._reads(way), self._seconds(way)
        return tuple(
            PhaseNeed(
                phase=name,
                ram_bytes=ram,
                vram_bytes=vram,
                read_bytes=reads[name],
                seconds=seconds[name],
            )
            for name, (ram, vram) in self.memory(way).items()
        )

    # Memory

    def _device_bytes(self, way: Way) -> dict[PhaseName, int]:
        """Where it is computed: on the GPU, or in RAM. The modulation table is made after the
        prompt was read; a GPU's allocator may still hold what that took. What is compiled is tried
        once before the first step."""
        model, wide = self.installed, _widened(way)
        layers = model.text_layers
        kept = wide * (
            outer_bytes(model)
            + 2 * model.decoder_parameters
            + way.blocks.resident * model.blocks.bytes
            + way.text.resident * layers.bytes
        )
        reading = wide * (way.text.slots * layers.bytes + self._reading_bytes())
        rows = wide * self._rows_bytes()
        making = max(rows, wide * PASSING * model.blocks.modulation_bytes)
        drawing = rows + self.drawing_bytes(way)
        return {
            "load": kept + (max(making, drawing) if way.compiled else making),
            "encode": kept + reading + (0 if way.device == "cpu" else making),
            "denoise": kept + drawing,
            "decode": kept + rows + self.decoding_bytes(way),
        }

    def _host_bytes(self, way: Way) -> dict[PhaseName, int]:
        """In RAM beside the process: weights that wait there, buffers on the way, pixels."""
        model, on_cpu = self.installed, way.device == "cpu"
        pixels = self.request.images * self.working.pixels * PIXEL_RAM
        if on_cpu:
            return {"load": 0, "encode": 0, "denoise": 0, "decode": pixels}
        blocks = _waiting(way.blocks, model.blocks) + _staging(way.blocks, model.blocks)
        text = _waiting(way.text, model.text_layers)
        reading = _staging(way.text, model.text_layers)
        passing = PASSING * max(model.blocks.bytes, model.blocks.modulation_bytes)
        return {
            "load": blocks + max(passing, model.bytes["vae"]),
            "encode": blocks + text + max(passing, reading),  # the blocks are read behind
            "denoise": blocks + text,
            "decode": blocks + text + pixels,
        }

    def _rows_bytes(self) -> int:
        """What a schedule or a prompt leaves on the device for all steps, in bfloat16: the table of
        the 20B family's modulation, or the keys and values of 2.1's prompts."""
        blocks = self.installed.blocks
        if self._caches_text:
            return sum(self._prompts) * blocks.count * 2 * blocks.width * 2
        return self.steps * blocks.count * 12 * blocks.width * 2

    def _reading_bytes(self) -> int:
        """Of the text encoder's numbers, in bfloat16: what a layer makes of every token."""
        layers = self.installed.text_layers
        inner = layers.bytes // (2 * layers.width)  # two thirds of a layer are its three matrices
        tokens = sum(self._prompts) + LEADING_TOKENS * len(self._prompts)
        return tokens * (8 * layers.width + inner) * 2

    def _hidden_bytes(self, way: Way) -> int:
        tokens = self._tokens + max(self._prompts)
        return tokens * self.installed.blocks.width * 2 * _widened(way)

    def _workspace(self, way: Way) -> int:
        return 0 if way.device == "cpu" else self.costs.workspace_bytes

    # Reads

    def _reads(self, way: Way) -> dict[PhaseName, int]:
        """Of a model that is not loaded yet and a prompt and a schedule that are new."""
        model, blocks = self.installed, self.installed.blocks
        layers = model.text_layers
        stays = blocks.count - way.blocks.streamed("disk")
        return {
            "load": outer_bytes(model)
            + model.bytes["vae"]
            + stays * blocks.bytes
            + blocks.count * blocks.modulation_bytes,
            "encode": layers.count * layers.bytes,
            "denoise": self.steps * self.disk_bytes_per_step(way),
            "decode": 0,
        }

    # Seconds

    def _seconds(self, way: Way) -> dict[PhaseName, float | None]:
        reads, disk = self._reads(way), self._rates(way).disk
        return {
            "load": reads["load"] / disk if disk else None,
            "encode": self._encode_seconds(way, reads["encode"]),
            "denoise": self.denoise_seconds(way),
            "decode": self._decode_seconds(way),
        }

    def _encode_seconds(self, way: Way, read: int) -> float | None:
        """A layer is sent on as soon as it is read, so the slower of the two counts."""
        rates, layers = self._rates(way), self.installed.text_layers
        copying = self._copying(way.text, layers.bytes, way)
        if not rates.disk or not rates.matmul or copying is None:
            return None
        products = sum(self._products(way, n + LEADING_TOKENS, layers) for n in self._prompts)
        return max(read / rates.disk, copying) + products * layers.count / rates.matmul

    def _computing(self, way: Way) -> float | None:
        """Seconds of all blocks of a step, for every picture and CFG half: products, attention,
        and what only moves numbers."""
        rates, blocks = self._rates(way), self.installed.blocks
        if not rates.matmul:
            return None
        family = self._family
        traffic = family.compiled_traffic if way.compiled else family.traffic
        total = 0.0
        for text in self._prompts:
            keys = self._tokens + text
            queries = self._tokens if self._caches_text else keys
            products = self._products(way, queries, blocks) / rates.matmul
            attention = 4 * queries * keys * blocks.width / (rates.attention or rates.matmul)
            moving = traffic * queries * blocks.width * 2 * _widened(way) / self._memory_rate(way)
            total += blocks.count * (products + attention + moving)
        return total * self.request.images

    def _reading(self, way: Way) -> float:
        """Seconds of a step that reading takes from the cores that compute."""
        if way.device != "cpu":
            return 0.0
        return self.disk_bytes_per_step(way) * self._rates(way).reading / self.device.cores

    def _products(self, way: Way, rows: int, layers: Blocks) -> float:
        """FLOP of the products of one of `layers`, for `rows` tokens; on a CPU with what it could
        do while it waits for the weights."""
        waiting = CPU_ROWS * layers.bytes if way.device == "cpu" else 0  # 2 FLOP for 2 bytes
        return rows * layers.token_bytes + waiting

    def _decode_seconds(self, way: Way) -> float | None:
        rates = self._rates(way)
        if not rates.matmul:
            return None
        family, decoding = self._family, DECODINGS[self.installed.model.family]
        again = 1 + decoding.seam * (way.strips - 1) / self.working.height
        # A smaller VAE has narrower layers: products go by the square of the width, traffic by it
        share = self.installed.decoder_parameters / decoding.parameters
        products = share * family.decode_flop / rates.matmul
        pixel = products + math.sqrt(share) * family.decode_traffic / self._memory_rate(way)
        return self.request.images * self.working.pixels * pixel * again

    def _copying(self, placement: Placement, size: int, way: Way) -> float | None:
        """Seconds to bring the streamed blocks, of `size` bytes each, to the device. One thread
        fills the buffers with what is not page-locked, while all that is ready crosses the bus."""
        rates = self.device.rates
        no_bus = way.device == "cpu" or self.device.shared_memory
        # What is read goes through the buffers of what waits in RAM: it comes no faster
        through = rates.bus and (rates.pageable or rates.bus)
        limits = {
            "pinned": [rates.bus],
            "pageable": [rates.pageable, rates.bus],
            "disk": [rates.disk] if no_bus else [rates.disk, through],
        }
        used = {place: n for place in limits if (n := placement.streamed(place))}
        if not all(min(limits[place]) for place in used):
            return None
        filling = [n * size / min(limits[place]) for place, n in used.items() if place != "pinned"]
        crossing = 0.0 if no_bus or not used else _streamed(placement) * size / rates.bus
        return max(sum(filling), crossing)

    def _memory_rate(self, way: Way) -> float:
        rates = self._rates(way)
        flop = CPU_FLOP_PER_BYTE if way.device == "cpu" else GPU_FLOP_PER_BYTE
        return rates.memory or rates.matmul / flop

    def _rates(self, way: Way) -> Rates:
        """What was measured was the device itself: of the CPU beside a GPU nothing is known."""
        own = way.device == self.device.torch_name
        return self.device.rates if own else Rates(disk=self.device.rates.disk)

    def _text_tokens(self, prompt: str) -> int:
        limit = self.installed.model.sampling.max_prompt_tokens
        tokens = math.ceil(len(prompt.encode()) / BYTES_PER_TOKEN) + TEMPLATE_TOKENS
        return min(tokens, limit) if limit else tokens


def outer_bytes(installed: Installed) -> int:
    """Of the transformer, what is not in its blocks."""
    blocks = installed.blocks
    in_blocks = blocks.count * (blocks.bytes + blocks.modulation_bytes)
    return max(0, installed.bytes["transformer"] - in_blocks)


def _streamed(placement: Placement) -> int:
    return placement.blocks - placement.resident


def _waiting(placement: Placement, blocks: Blocks) -> int:
    """RAM of the streamed blocks."""
    return (placement.streamed("pinned") + placement.streamed("pageable")) * blocks.bytes


def _staging(placement: Placement, blocks: Blocks) -> int:
    """RAM of the page-locked buffers that streamed blocks are sent through."""
    staged = placement.streamed("pageable") + placement.streamed("disk")
    return placement.slots * blocks.bytes * bool(staged)


def _widened(way: Way) -> int:
    """Times bfloat16."""
    return 2 if way.dtype == "float32" else 1
