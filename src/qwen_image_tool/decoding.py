"""What it takes to turn latents into pixels: pure arithmetic, no torch."""

from dataclasses import dataclass

from qwen_image_tool.types import Size

MOST_STRIPS, MIN_STRIP = 10, 64  # and pixel rows: in thinner ones most work is done twice


def most_strips(size: Size) -> int:
    """In how many a picture is decoded at most."""
    return max(1, min(MOST_STRIPS, size.height // MIN_STRIP))


@dataclass(frozen=True)
class Stage:
    """How far a single-frame decoder works on the whole frame before it goes on in strips.

    `depth`: how many halves of the blocks that double the frame, each of them its residual blocks
    and the doubling. `most`: the strips up to which it is chosen.

    Bytes a pixel of the frame: `head` for what is done on the whole of it, `kept` for what is held
    from strip to strip (the head's result and the pixels). Bytes a pixel of a strip: `strip`; it is
    worked with `margin` rows of pixels beside its own.
    """

    depth: int
    head: int
    kept: int
    strip: int
    margin: int
    most: int = 1 << 30


@dataclass(frozen=True)
class Decoding:
    """Working memory of a single-frame decoder in bfloat16, beside its weights and what its kernels
    take.

    `stages`: the fewer strips, the further it works on the whole frame, which brings the picture
    closer to the one that is made in one piece. `cell`: pixels a side of one latent cell. `whole`:
    bytes a pixel of diffusers' own decoder, which exact mode keeps.
    """

    cell: int
    stages: tuple[Stage, ...]
    whole: int

    def stage(self, strips: int) -> Stage:
        """The one that a decode in this many strips is worked by."""
        return next(stage for stage in self.stages if strips <= stage.most)

    def bytes(self, size: Size, strips: int) -> int:
        """The most that a decode in this many strips holds at a time."""
        stage, rows = self.stage(strips), -(-size.height // self.cell // strips) * self.cell
        part = stage.strip * size.width * min(size.height, rows + stage.margin)
        return max(stage.head * size.pixels, stage.kept * size.pixels + part)

    def strips(self, size: Size, budget: int) -> int | None:
        """The fewest strips that stay within a budget of bytes; None where none does."""
        choices = range(1, size.height // self.cell + 1)
        return next((n for n in choices if self.bytes(size, n) <= budget), None)


# Counted by tests/live.py, and tests/test_vae.py holds them to it; where the kernels of one stage
# take more for themselves than those of the others, with that
DECODINGS = {
    "qwen-image": Decoding(
        cell=8,
        stages=(
            Stage(depth=0, head=102, kept=18, strip=680, margin=24, most=1),
            Stage(depth=2, head=102, kept=30, strip=680, margin=24),
        ),
        whole=4250,
    ),
    "qwen-image-2.1": Decoding(
        cell=16,
        stages=(
            Stage(depth=0, head=68, kept=17, strip=2400, margin=48, most=1),
            Stage(depth=6, head=990, kept=297, strip=2020, margin=8, most=3),
            Stage(depth=5, head=667, kept=225, strip=2020, margin=16, most=8),
            Stage(depth=2, head=120, kept=50, strip=2040, margin=24),
        ),
        whole=6800,
    ),
}
