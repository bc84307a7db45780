"""What it takes to turn latents into pixels: pure arithmetic, no torch."""

from dataclasses import dataclass

from qwen_image_tool.types import Size


@dataclass(frozen=True)
class Decoding:
    """Working memory of a single-frame decoder in bfloat16, beside its weights.

    Bytes a pixel of the frame: `head` for the part that sees the whole frame, `kept` for what is
    held from strip to strip (the head's result and the pixels). Bytes a pixel of a strip: `strip`;
    it is worked with `margin` rows of pixels beside its own. `cell`: pixels a side of one latent
    cell. `whole` is diffusers' own decoder, which exact mode keeps.
    """

    cell: int
    head: int
    kept: int
    strip: int
    margin: int
    whole: int

    def bytes(self, size: Size, strips: int) -> int:
        """The most that a decode in this many strips holds at a time."""
        rows = -(-size.height // self.cell // strips) * self.cell
        part = self.strip * size.width * min(size.height, rows + self.margin)
        return max(self.head * size.pixels, self.kept * size.pixels + part)

    def strips(self, size: Size, budget: int) -> int | None:
        """The fewest strips that stay within a budget of bytes; None where none does."""
        choices = range(1, size.height // self.cell + 1)
        return next((n for n in choices if self.bytes(size, n) <= budget), None)


# Counted by tests/live.py; tests/test_vae.py holds them to it
DECODINGS = {
    "qwen-image": Decoding(cell=8, head=102, kept=18, strip=680, margin=24, whole=4250),
    "qwen-image-2.1": Decoding(cell=16, head=68, kept=17, strip=2040, margin=48, whole=6800),
}
