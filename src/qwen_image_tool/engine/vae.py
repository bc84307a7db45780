"""Latents -> pixels."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from qwen_image_tool.decoding import Decoding
from qwen_image_tool.engine.checks import check_finite
from qwen_image_tool.types import Size

# Latent cells, their mean and their deviation, to latent cells as the VAE reads them
Unscale = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Rows = tuple[int, int]  # first, and one past the last
INDEXED = 2**31 - 1  # bytes of a tensor that torch's kernels reduce at a time


def scale(vae: Any) -> int:
    """Pixels a side of one latent cell."""
    return int(2 ** len(vae.temperal_downsample))


def decode(
    vae: Any,
    cells: torch.Tensor,
    unscale: Unscale,
    strips: int = 1,
    check: Callable[[], None] | None = None,
) -> Image.Image:
    """One picture's latent cells, [1, channels, 1, height, width], to its RGB or RGBA picture.

    `strips`: how many parts, one below the other, a single-frame decoder works in. More take less
    memory and more time; the picture is the same within rounding. Raises ValueError where the
    decoder is diffusers' own, which has no strips, or where there are more than rows of cells;
    BrokenPicture where a number of it is not finite; and what `check` raises, which is asked before
    each layer.
    Source: the end of QwenImagePipeline.__call__.
    """
    cells = cells.to(vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(cells)
    std = torch.tensor(vae.config.latents_std).view(shape).to(cells)
    with _asked(vae.decoder, check) if check else nullcontext():
        made, extremes = levels(vae, unscale(cells, mean, std), strips)
    check_finite(extremes)
    return Image.fromarray(made.cpu().numpy())


def levels(vae: Any, cells: torch.Tensor, strips: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent cells as the VAE reads them to uint8 [height, width, 3 or 4], on their device; and the
    least and the greatest of each strip's pixels before they are cut to levels, [2 * strips]: not a
    number where a pixel is not."""
    made, extremes = [], list[torch.Tensor]()
    for part in _parts(vae, cells, strips):
        made.append(_levels(part))
        extremes += torch.aminmax(part)
    return torch.cat(made), torch.stack(extremes)


def _parts(vae: Any, cells: torch.Tensor, strips: int) -> Iterator[torch.Tensor]:
    """A picture's strips from the top, [1, 3 or 4, height, width] in -1 to 1."""
    if isinstance(vae.decoder, _Decoder):
        yield from vae.decoder.strips(cells[:, :, 0], strips)
    elif strips == 1:
        yield vae.decode(cells, return_dict=False)[0][:, :, 0]
    else:
        raise ValueError("diffusers' own decoder has no strips")


def keep_decoder(vae: Any) -> None:
    """Let go of what reads pixels, in place: making them does without. `vae.encode` does not work
    afterwards."""
    vae.encoder, vae.quant_conv = nn.Identity(), nn.Identity()


def make_single_frame(vae: Any, decoding: Decoding, faithful: bool) -> None:
    """Turn the VAE's decoder, in place, into one for a single frame: faster, within rounding, and
    in less memory. `vae.decode` does not work afterwards; `decode` does.

    `decoding`: how it works in strips. `faithful`: a convolution stays the operation that diffusers
    calls where a GPU's kernels for the shorter one add in another order, so that bfloat16 is
    rounded to the same numbers. That is slower.
    """
    vae.decoder = _Decoder(vae.post_quant_conv, vae.decoder, decoding, faithful)


def crop_centre(image: Image.Image, size: Size) -> Image.Image:
    """The centre of a picture that was worked at the next multiple up."""
    left, top = (image.width - size.width) // 2, (image.height - size.height) // 2
    return image.crop((left, top, left + size.width, top + size.height))


@contextmanager
def _asked(decoder: nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """`check` is called before each of the decoder's layers."""
    layers = [layer for layer in decoder.modules() if not [*layer.children()]]
    hooks = [layer.register_forward_pre_hook(lambda *_: check()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _levels(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in -1 to 1, [1, 3 or 4, height, width], to levels in 0 to 255. Source:
    VaeImageProcessor.postprocess."""
    unit = (pixels[0].clamp(-1, 1) * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return (unit.float() * 255).round().to(torch.uint8)


class _Layer(nn.Module):
    """From and to one frame, [1, channels, height, width]."""

    def __call__(self, frame: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().__call__(frame)
        return result


class _Part(_Layer):
    """A layer that gives `factor` rows for one, and sees a few rows around a row."""

    factor = 1

    def needs(self, rows: Rows) -> Rows:
        """The rows, of a frame without borders, that these rows of the result are made from."""
        raise NotImplementedError


class _Decoder(nn.Module):
    """The decoder of AutoencoderKLQwenImage or of AutoencoderKLQwenImage21, for a single frame.

    The head sees the whole frame at the size of the latents, because of its attention. Each part
    of the tail sees a few rows around a row (`needs`), so it can run on strips of the frame. Not
    all do: on few pixels cuDNN takes another kernel for another height, which adds in another
    order. So the first parts work on the whole frame, and the next ones on bands of it
    (`Decoding`), of which those rows are held that the next strip sees.

    In float32 weights and numbers are channels-last, which is faster. In bfloat16 they are not: it
    would change the order of sums, and so deep in bfloat16 one rounding grows to several levels.
    On Apple's GPU channels-last is not verified.
    """

    def __init__(
        self, post_quant_conv: Any, decoder: Any, decoding: Decoding, faithful: bool
    ) -> None:
        super().__init__()
        self._decoding = decoding
        middle = decoder.mid_block
        first, *rest = (_Residual(block, faithful) for block in middle.resnets)
        between = [_Attention(attention) for attention in middle.attentions]
        into = _Conv(post_quant_conv, faithful), _Conv(decoder.conv_in, faithful)
        self.head = nn.Sequential(*into, first)
        for attention, block in zip(between, rest, strict=True):
            self.head.extend([attention, block])
        *ups, last = decoder.up_blocks
        self._parts: list[_Part] = []
        ends = [0]  # in `_parts`, of the halves of the blocks that double
        for up in ups:
            for half in _halves(up, faithful):
                self._parts += half
                ends.append(len(self._parts))
        self._start, self._middle = ends[decoding.depth], ends[decoding.band_depth]
        # On as many pixels as the picture has, cuDNN's 2D and 3D kernels add in the same order
        faithful = faithful and decoder.conv_out.weight.ndim == 4
        self._parts += _residuals(last, faithful)
        self._parts.append(_Output(decoder.norm_out, decoder.conv_out, faithful))
        self.tail = nn.ModuleList(self._parts)
        convs = (each for part in self._parts[self._start :] for each in part.modules())
        self._in_strips = [each for each in convs if isinstance(each, _Conv)]
        kind = decoder.conv_in.weight
        plain = kind.dtype != torch.float32 or kind.device.type == "mps"
        self._format = torch.contiguous_format if plain else torch.channels_last
        for weight in self.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=self._format)

    def strips(self, cells: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """[1, z, height, width] to `count` times [1, 3 or 4, rows, width], from top to bottom."""
        if not 1 <= count <= cells.shape[2]:
            raise ValueError(f"{cells.shape[2]} rows of latent cells don't make {count} strips")
        height = cells.shape[2] * _factor(self._parts)
        for conv in self._in_strips:
            conv.sees_zeros = count == 1
        frame = self.head(cells.contiguous(memory_format=self._format))
        if count == 1:
            yield self._strip(self._parts, frame, (0, height), height)
            return
        for part in self._parts[: self._start]:
            frame = part(frame)
        into_bands, parts = self._parts[self._start : self._middle], self._parts[self._middle :]
        tall, wide = (side * _factor(into_bands) for side in frame.shape[2:])
        bands = iter(_cut(tall, self._decoding.bands(tall * wide)))
        start, end = band = next(bands)
        window = self._strip(into_bands, frame, band, tall)
        for first, last in _cut(tall, count):
            rows = first * _factor(parts), last * _factor(parts)
            low, high = _needs(parts, rows, height)[0]
            window, start = window[:, :, low - start :], low
            if end < high:
                window = window.clone()  # only these rows of it live on
            while end < high:
                _, end = band = next(bands)
                window = torch.cat([window, self._strip(into_bands, frame, band, tall)], dim=2)
            yield self._strip(parts, window, rows, height, start)

    def _strip(
        self, parts: Sequence[_Part], frame: torch.Tensor, rows: Rows, height: int, top: int = 0
    ) -> torch.Tensor:
        """The rows that `parts` make, of a result of this height, from a frame that begins with row
        `top`. Each is given the rows it needs: where they end inside the frame, those it spoils
        with its padding are cut off."""
        (start, end), *outcomes = _needs(parts, rows, height)
        frame = frame[:, :, start - top : end - top]
        for part, (low, high) in zip(parts, outcomes, strict=True):
            top = start * part.factor
            frame = part(frame)[:, :, low - top : high - top]
            frame = frame.contiguous(memory_format=self._format)
            start = low
        return frame


def _factor(parts: Sequence[_Part]) -> int:
    """How many rows they make of one, and columns."""
    return math.prod(part.factor for part in parts)


def _cut(height: int, count: int) -> list[Rows]:
    """As many times rows, one after the other."""
    edges = [height * edge // count for edge in range(count + 1)]
    return list(pairwise(edges))


def _needs(parts: Sequence[_Part], rows: Rows, height: int) -> list[Rows]:
    """The rows that go into each of `parts`, and at last those of their result, which has this
    height."""
    found = [rows]
    for part in reversed(parts):
        height //= part.factor
        low, high = part.needs(found[0])
        found.insert(0, (max(low, 0), min(high, height)))
    return found


class _Conv(_Layer):
    """A convolution. For one frame a causal 3D convolution is the 2D one with its last temporal
    tap: the others only see the zeros before the first frame. A `faithful` one stays 3D; in strips
    it `sees_zeros` no longer, because with them cuDNN splits the sums at the end of a frame, which
    would move with the strip. Source: QwenImageCausalConv3d, QwenImage21CausalConv3d."""

    def __init__(self, conv: Any, faithful: bool = False) -> None:
        super().__init__()
        causal = getattr(conv, "_padding", None)  # left, right, top, bottom, zeros before
        self.faithful = faithful and any(causal or ())
        self.sees_zeros = True
        taps = conv.weight
        if taps.ndim == 5 and not self.faithful:
            taps = taps[:, :, -1]
        self.weight = nn.Parameter(taps.clone(), requires_grad=False)
        self.bias = nn.Parameter(conv.bias, requires_grad=False)
        self.padding = (causal[2], causal[0]) if causal else conv.padding
        self._causal = [*causal][: 2 * (taps.ndim - 2)] if causal else []

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        if not self.faithful:
            return functional.conv2d(frame, self.weight, self.bias, padding=self.padding)
        if self.weight.ndim == 4:
            return functional.conv2d(functional.pad(frame, self._causal), self.weight, self.bias)
        if self.sees_zeros:
            frames = functional.pad(frame[:, :, None], self._causal)
            return functional.conv3d(frames, self.weight, self.bias)[:, :, 0]
        frames = functional.pad(frame[:, :, None], self._causal[:4])
        return functional.conv3d(frames, self.weight[:, :, -1:], self.bias)[:, :, 0]


class _Norm(_Layer):
    """A pixel's channels over their root mean square. The sum of squares is made in float32
    without a copy of the frame in float32, except where torch would add the channels of the copy
    part by part: then a `faithful` one makes it as well. Source: QwenImageRMS_norm."""

    def __init__(self, norm: Any, faithful: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.view(-1, 1, 1), requires_grad=False)
        self.scale = norm.scale
        self._faithful = faithful

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        in_parts = frame.numel() * torch.float32.itemsize > INDEXED
        seen = frame.float() if self._faithful and in_parts else frame
        length = torch.linalg.vector_norm(seen, dim=1, keepdim=True, dtype=torch.float32)
        del seen
        unit = torch.div(frame, length.clamp_min_(1e-12), out=torch.empty_like(frame))
        return unit.mul_(self.scale).mul_(self.gamma)


class _Residual(_Part):
    """Source: QwenImageResidualBlock."""

    def __init__(self, block: Any, faithful: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _Norm(block.norm1, faithful), _Conv(block.conv1, faithful)
        self.norm2, self.conv2 = _Norm(block.norm2, faithful), _Conv(block.conv2, faithful)
        same = isinstance(block.conv_shortcut, nn.Identity)
        self.shortcut = None if same else _Conv(block.conv_shortcut, faithful)
        self._reach = self.conv1.padding[0] + self.conv2.padding[0]

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(_silu(self.norm1(frame)))
        inner = _silu(self.norm2(inner))
        inner = self.conv2(inner)
        return inner.add_(frame if self.shortcut is None else self.shortcut(frame))

    def needs(self, rows: Rows) -> Rows:
        return rows[0] - self._reach, rows[1] + self._reach


class _Attention(_Layer):
    """Each pixel looks at all others. Source: QwenImageAttentionBlock."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = (
            _Norm(block.norm),
            _Conv(block.to_qkv),
            _Conv(block.proj),
        )

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        # [1, 1 head, pixels, 3 * channels]
        qkv = self.to_qkv(self.norm(frame)).flatten(2).transpose(1, 2).contiguous()[None]
        query, key, value = qkv.chunk(3, dim=-1)
        seen = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(seen[0].transpose(1, 2).unflatten(2, frame.shape[2:])).add_(frame)


class _Upsample(_Part):
    """Twice the rows and columns. Source: QwenImageResample, of which the first frame skips
    `time_conv`; nearest pixels need no float32."""

    factor = 2

    def __init__(self, resample: Any) -> None:
        super().__init__()
        self.conv = _Conv(resample.resample[1])

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.interpolate(frame, scale_factor=2, mode="nearest"))

    def needs(self, rows: Rows) -> Rows:
        reach = self.conv.padding[0]
        return (rows[0] - reach) // 2, -((-rows[1] - reach) // 2)


class _Beside(_Part):
    """Parts whose result is put beside what they are made from: their channels first."""

    def __init__(self, parts: list[_Part]) -> None:
        super().__init__()
        self._parts = parts
        self.parts = nn.Sequential(*parts)

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.parts(frame), frame], dim=1)

    def needs(self, rows: Rows) -> Rows:
        for part in reversed(self._parts):
            rows = part.needs(rows)
        return rows


class _Doubling(_Part):
    """Doubles the first channels; the others, those of the shortcut, are spread over the new
    pixels. Source: QwenImage21ResidualUpBlock, QwenImage21DupUp3D."""

    factor = 2

    source: torch.Tensor

    def __init__(self, upsample: _Part, spread: Any) -> None:
        super().__init__()
        self.upsample = upsample
        self._channels = spread.in_channels
        # Which channel a new channel reads at each of the four pixels, in the last frame
        source = torch.arange(spread.in_channels).repeat_interleave(spread.repeats)
        source = source.view(spread.out_channels, spread.factor_t, spread.factor_s**2)[:, -1]
        self.register_buffer("source", source.T.contiguous(), persistent=False)

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        inner, shortcut = frame[:, : -self._channels], frame[:, -self._channels :]
        doubled: torch.Tensor = self.upsample(inner)
        for place, channels in enumerate(self.source):
            row, column = divmod(place, 2)
            doubled[:, :, row::2, column::2] += shortcut[:, channels]
        return doubled

    def needs(self, rows: Rows) -> Rows:
        return self.upsample.needs(rows)


class _Output(_Part):
    """Source: the end of QwenImageDecoder3d.forward."""

    def __init__(self, norm: Any, conv: Any, faithful: bool) -> None:
        super().__init__()
        self.norm, self.conv = _Norm(norm, faithful), _Conv(conv, faithful)

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        return self.conv(_silu(self.norm(frame)))

    def needs(self, rows: Rows) -> Rows:
        return rows[0] - self.conv.padding[0], rows[1] + self.conv.padding[0]


def _residuals(block: Any, faithful: bool) -> list[_Part]:
    return [_Residual(each, faithful) for each in block.resnets]


def _halves(block: Any, faithful: bool) -> tuple[list[_Part], list[_Part]]:
    """What a QwenImageUpBlock or a QwenImage21ResidualUpBlock does before it doubles the frame, and
    the doubling."""
    residuals = _residuals(block, faithful)
    if not hasattr(block, "avg_shortcut"):
        return residuals, [_Upsample(each) for each in block.upsamplers]
    return [_Beside(residuals)], [_Doubling(_Upsample(block.upsampler), block.avg_shortcut)]


def _silu(frame: torch.Tensor) -> torch.Tensor:
    return functional.silu(frame, inplace=True)
