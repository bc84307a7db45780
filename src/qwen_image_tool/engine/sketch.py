"""Previews while a picture is drawn: a linear map from latents to colours, learned from what the
VAE decoded before. No weights are downloaded for it, and it costs one small matrix product, beside
the loop."""

import contextlib
import hashlib
import io
import logging
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from qwen_image_tool.files import replace_file

ENOUGH = 64  # pictures to learn from; more would change nothing that can be seen
SIDE = 160  # pixels of a preview's longer side, at least; a viewer makes more of it for nothing
RIDGE = 1e-3  # keeps the map small where few pictures say little

Show = Callable[[int, torch.Tensor], None]  # a step, and latents that nobody else writes
_log = logging.getLogger(__name__)


class Sideshow:
    """Draws beside the loop, in a thread: `show` returns at once, what is newer takes the place of
    what was not begun, and the order stays. `told(step, picture)` and `failed(error)` are called in
    that thread; after a failure nothing more is drawn. As a context it ends with the last one
    drawn."""

    def __init__(
        self,
        draw: Callable[[torch.Tensor], bytes | None],
        told: Callable[[int, bytes], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._draw, self._told, self._failed = draw, told, failed
        self._lock = threading.Lock()
        self._newest: tuple[int, torch.Tensor] | None = None
        self._thread = ThreadPoolExecutor(1, "preview")
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def show(self, step: int, latents: torch.Tensor) -> None:
        with self._lock:
            asked, self._newest = self._newest is not None, (step, latents)
        if not (asked or self._broken):
            self._thread.submit(self._draw_newest)

    def _draw_newest(self) -> None:
        with self._lock:
            newest, self._newest = self._newest, None
        if newest is None or self._broken:
            return
        try:
            with torch.inference_mode():  # a thread's own state
                picture = self._draw(newest[1])
            if picture:
                self._told(newest[0], picture)
        except Exception as error:  # noqa: BLE001  the picture is worth more than its preview
            self._broken = True
            _log.exception("A preview failed.")
            self._failed(error)


class Sketch:
    """Draws previews for the VAE that `identity` names; what it has learned lies in `folder`, so
    the first picture of a model has none. A folder that can't be written is no error.

    Least squares, through the sums A'A and A'b over all pictures, where a row of A is a latent cell
    (and 1) and a row of b its mean colour.
    """

    def __init__(self, folder: Path, identity: Sequence[str]) -> None:
        name = hashlib.sha256("\0".join(identity).encode()).hexdigest()
        self._path = folder / f"{name}.npz"
        sums = self._read()
        self._map = _solve(*sums[:2]) if sums else None

    def draw(self, cells: torch.Tensor) -> bytes | None:
        """A JPEG of one picture's latent cells, [channels, 1, height, width]; None as long as no
        picture of this VAE was decoded."""
        if self._map is None:
            return None
        # NumPy: torch would start a second team of threads beside the one of the loop
        values = cells[:, 0].permute(1, 2, 0).float().cpu().numpy()
        colours = values @ self._map[:-1] + self._map[-1]
        image = Image.fromarray(colours.clip(0, 255).round().astype(np.uint8))
        grow = max(1, -(-SIDE // max(image.size)))
        image = image.resize((image.width * grow, image.height * grow), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    def learn(self, cells: torch.Tensor, image: Image.Image) -> None:
        """`cells`: the final latents of `image`, [channels, 1, height, width]. A picture that was
        cut to another shape teaches nothing."""
        height, width = cells.shape[2:]
        sums = self._read()
        apart = image.width * height != image.height * width or image.width % width
        if apart or (sums and sums[2] >= ENOUGH):
            return
        small = np.asarray(_on_white(image).resize((width, height), Image.Resampling.BOX))
        colours = small.reshape(-1, 3).astype(np.float64)
        rows = cells[:, 0].permute(1, 2, 0).double().cpu().numpy().reshape(len(colours), -1)
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        squares, products, pictures = sums or (0.0, 0.0, 0)
        squares, products = squares + rows.T @ rows, products + rows.T @ colours
        self._map = _solve(squares, products)
        self._write(squares, products, pictures + 1)

    def _read(self) -> tuple[Any, Any, int] | None:
        damaged = ValueError, KeyError, EOFError, zipfile.BadZipFile
        with (
            contextlib.suppress(OSError, *damaged),
            self._path.open("rb") as file,
            np.load(file) as kept,
        ):
            return kept["squares"], kept["products"], int(kept["pictures"])
        return None

    def _write(self, squares: Any, products: Any, pictures: int) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, squares=squares, products=products, pictures=pictures)
        with contextlib.suppress(OSError):
            replace_file(self._path, buffer.getvalue())


def _solve(squares: Any, products: Any) -> Any:
    """[channels + 1, 3], float32."""
    ridge = RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares))
    return np.linalg.solve(squares + ridge, products).astype(np.float32)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
