"""What it takes to turn latents into pixels: pure arithmetic, no torch."""

from dataclasses import dataclass

from qwen_image_tool.types import Size

MOST_STRIPS, MIN_STRIP = 20, 64  # and pixel rows: in thinner ones most work is done twice

# Pixels of a frame, from which on cuDNN takes the same kernels on an H100 as for any larger one
# (benchmarks/heights.py)
BAND = 1 << 16


@dataclass(frozen=True)
class Decoding:
    """How a single-frame decoder works on a picture in strips, and its working memory in bfloat16,
    beside its weights and what its kernels take.

    `parameters`: of the published decoder and of the convolution before it.

    `cell`: pixels a side of one latent cell. `depth`: how many halves of the blocks that double the
    frame, each of them its residual blocks and the doubling, work on the whole frame; from there to
    `band_depth` they work on bands of it, and the rest on strips.

    Bytes a pixel of the frame: `whole` for diffusers' own decoder, which exact mode keeps; `piece`
    for ours in one piece; `head` for what is done on the whole frame before the strips; `kept` for
    what is held from strip to strip (the head's result and the pixels).

    Bytes a pixel of a band: `making` while it is made; `band` for what is held of it.

    Bytes a pixel of a strip: `strip`; where it takes the most it has `margin` rows of pixels beside
    its own. `seam`: rows of pixels that are worked a second time where two strips meet, as many as
    take the time.
    """

    parameters: int
    cell: int
    depth: int
    band_depth: int
    whole: int
    piece: int
    head: int
    kept: int
    making: int
    band: int
    strip: int
    margin: int
    seam: int

    @property
    def band_cell(self) -> int:
        """Pixels a side of one pixel of a band."""
        return self.cell >> self.band_depth // 2

    def bands(self, pixels: int) -> int:
        """How many make a frame of so many pixels of their own, one after the other."""
        return 1 if self.band_depth == self.depth else max(1, pixels // BAND)

    def bytes(self, size: Size, strips: int) -> int:
        """The most that a decode in this many strips holds at a time."""
        if strips == 1:
            return self.piece * size.pixels
        rows = -(-size.height // self.band_cell // strips) * self.band_cell + self.margin
        bands = self.bands(size.pixels // self.band_cell**2)
        band = -(-size.height // bands)
        over = rows if bands > 1 else 0  # rows of the band before, which the next strip sees
        in_bands = self.band * over + self.making * min(size.height, band + self.margin)
        in_strips = self.band * min(size.height, band + over) + self.strip * min(size.height, rows)
        tail = self.kept * size.pixels + size.width * max(in_bands, in_strips)
        return max(self.head * size.pixels, tail)

    def most_strips(self, size: Size) -> int:
        """The fewest of those that take the least."""
        most = max(1, min(MOST_STRIPS, size.height // MIN_STRIP))
        return min(range(1, most + 1), key=lambda strips: self.bytes(size, strips))

    def strips(self, size: Size, budget: int) -> int | None:
        """The fewest strips that stay within a budget of bytes; None where none does."""
        choices = range(1, size.height // self.cell + 1)
        return next((n for n in choices if self.bytes(size, n) <= budget), None)


# Counted by tests/live.py, and tests/test_vae.py holds them to it; where the kernels of one stage
# take more for themselves than those of the others, with that
DECODINGS = {
    "qwen-image": Decoding(
        parameters=73_295_603,
        cell=8,
        depth=2,
        band_depth=2,
        whole=4250,
        piece=698,
        head=102,
        kept=30,
        making=0,
        band=0,
        strip=680,
        margin=24,
        seam=32,
    ),
    "qwen-image-2.1": Decoding(
        parameters=259_048_212,
        cell=16,
        depth=3,
        band_depth=5,
        whole=6800,
        piece=2417,
        head=250,
        kept=90,
        making=510,
        band=216,
        strip=2020,
        margin=16,
        seam=24,
    ),
}
