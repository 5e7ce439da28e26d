"""The CPU path of :mod:`vito_kernels.photometric`: one image at a time, in buffers that stay in the second-level cache.

A 224-pixel image is three float32 planes of 200 kB, so that every operation below is a vectorised pass over data in the
cache and costs microseconds; large buffers are made once. What makes it fast besides:

- HSV is never formed. With V and C the largest channel and the largest minus the smallest, saturation times f moves
  every channel to ``V - (V - x) min(f, V / C)``; hue goes by the identity in ``_Colour._hue``, which needs no
  comparison and no branch.
- Blur is two banded matrix products: 16 output rows (then columns) at a time need 16 + 2 radius input rows, and all
  these blocks share one small Toeplitz matrix. Taps below 2^-24 of the centre are left out, so small sigmas cost less.
- A grey image is blurred and solarised as one plane.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .reference.photometric import GREY_WEIGHTS, ORDERS

BLOCK = 16  # rows or columns of a block of the blur: the width of a float32 vector, and close to the fewest operations
FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller has made the default
TINY = 1e-30  # stands for a chroma of zero, where any finite quotient gives the same colour


def photometric(
    images: Tensor, params: Tensor, radius: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(B, H, W, 3) uint8 to (B, H, W, 3) ``dtype``; the arguments of the public function, checked."""
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    inference = torch.is_inference_mode_enabled()
    work = iter(zip(images.unbind(), params.tolist(), out.unbind(), strict=True))
    lock = Lock()

    def worker() -> None:
        with torch.inference_mode(inference):
            augment = _Augment(images.shape[1], images.shape[2], radius, mean, std)
            while True:
                with lock:
                    task = next(work, None)
                if task is None:
                    return
                augment(*task)

    _in_threads(worker, min(torch.get_num_threads(), images.shape[0]))
    return out


def _in_threads(worker: Callable[[], None], count: int) -> None:
    """Runs ``worker`` in ``count`` threads at once, in each of which PyTorch's operators keep to that one thread.

    Images are independent and an operator on one lasts microseconds, too short to be worth dividing.
    ``set_num_threads`` acts on the thread that calls it and on threads yet to come; calling it again here puts the
    latter back.
    """
    if count <= 1:
        worker()
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(worker) for _ in range(count)]:
                done.result()
    finally:
        torch.set_num_threads(threads)


class _Augment:
    """The whole chain for one image after the other, with buffers of its own."""

    def __init__(self, height: int, width: int, radius: int, mean: Sequence[float], std: Sequence[float]):
        self.colour, self.blur = _Colour(height, width), _Blur(height, width, radius)
        self.mean_C11, self.std_C11 = (torch.tensor(x, **FLOAT).view(3, 1, 1) for x in (mean, std))

    def __call__(self, image: Tensor, row: Sequence[float], target: Tensor) -> None:
        """image (H, W, 3) uint8, row of the parameters, target (H, W, 3)."""
        *jitter, order, grey, sigma, threshold = row
        x = self.colour(image, jitter, int(order), grey > 0)
        if self.blur.reach(sigma) > 0:
            x = self.blur(x, sigma)
        if threshold <= 1:
            _solarise(x, threshold)
        x = torch.sub(x, self.mean_C11, out=self.colour.planes).div_(self.std_C11).to(target.dtype)
        for channel in range(3):  # faster than one permuted copy
            target[..., channel].copy_(x[channel])


class _Colour:
    """Jitter and grey. Every operation's result lies in [0, 1], as the planes do; only the first two need a clip."""

    def __init__(self, height: int, width: int):
        self.planes = torch.empty(3, height, width, **FLOAT)
        self.scratch = torch.empty(4, height, width, **FLOAT)
        self.operations = (_brightness, _contrast, self._saturation, self._hue)
        self.grey_weights = torch.tensor(GREY_WEIGHTS, **FLOAT)

    def __call__(self, image: Tensor, amounts: Sequence[float], order: int, grey: bool) -> Tensor:
        """(H, W, 3) uint8 to planes (3, H, W), or (1, H, W) if grey, that the next call overwrites."""
        x = self.planes.copy_(image.permute(2, 0, 1)).div_(255)
        for operation in ORDERS[order] if order >= 0 else ():
            self.operations[operation](x, amounts[operation])
        if not grey:
            return x
        flat = self.scratch[0].flatten()
        torch.mv(x.flatten(1).t(), self.grey_weights, out=flat)
        return self.scratch[:1]

    def _chroma(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest and smallest channel, and their difference: three planes of the scratch."""
        top, bottom, chroma, _ = self.scratch
        torch.amax(x, 0, out=top)
        torch.amin(x, 0, out=bottom)
        torch.sub(top, bottom, out=chroma)
        return top, bottom, chroma

    def _saturation(self, x: Tensor, factor: float) -> None:
        if factor <= 1:
            top = torch.amax(x, 0, out=self.scratch[0])
            x.lerp_(top.expand_as(x), 1 - max(factor, 0.0))
            return
        top, _, chroma = self._chroma(x)
        ratio = torch.div(top, chroma.clamp_min_(TINY), out=chroma).clamp_max_(factor)
        torch.lerp(top.expand_as(x), x, ratio.expand_as(x), out=x)

    def _hue(self, x: Tensor, turns: float) -> None:
        """Shifts the hue by ``turns``.

        With chroma C and smallest channel m, the hue lies ``|u| = (C - m + g + b - r) / C`` sixths of a turn from red,
        on the side of green where g > b; and the channel whose own hue is o becomes ``m + C clip(2 - d, 0, 1)``, d the
        distance from u to o round the circle of six, which is ``3 - ||u - o| - 3|`` while u - o stays within one turn.
        It does, because thirds of a turn merely rename the channels.
        """
        thirds = round(3 * turns)
        rest = 6 * turns - 2 * thirds
        r, g, b = x
        _, bottom, chroma = self._chroma(x)
        top_u = self.scratch[0]
        side = self.scratch[3]
        torch.sub(g, b, out=side)
        u = torch.add(g, b, out=top_u).sub_(r).sub_(bottom).add_(chroma)
        chroma.clamp_min_(TINY)
        u.div_(chroma).copysign_(side)
        bottom.sub_(chroma)
        own = [(2.0 * (channel - thirds) + 3) % 6 - 3 - rest for channel in range(3)]
        torch.sub(u, torch.tensor(own, **FLOAT).view(3, 1, 1), out=x)
        x.abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(bottom, chroma, x, out=x)


def _brightness(x: Tensor, delta: float) -> None:
    x.add_(delta).clamp_(0, 1)


def _contrast(x: Tensor, factor: float) -> None:
    rest = x.mean((1, 2), keepdim=True).mul_(1 - factor)
    torch.add(rest, x, alpha=factor, out=x).clamp_(0, 1)


def _solarise(x: Tensor, threshold: float) -> None:
    over = x.clone().ge_(threshold)
    x.addcmul_(x, over, value=-2).add_(over)


class _Blur:
    """Separable Gaussian by banded matrix products over zero-padded planes."""

    def __init__(self, height: int, width: int, radius: int):
        self.height, self.width, self.radius = height, width, radius
        self.row_blocks, self.column_blocks = -(-height // BLOCK), -(-width // BLOCK)
        rows, columns = self.row_blocks * BLOCK, self.column_blocks * BLOCK
        self.padded = torch.zeros(3, rows + 2 * radius, columns + 2 * radius, **FLOAT)
        self.halfway = torch.empty(3, rows, columns + 2 * radius, **FLOAT)
        self.done = torch.empty(3, rows, columns, **FLOAT)

    def reach(self, sigma: float) -> int:
        """Taps on each side that are at least 2^-24 of the one in the middle."""
        return min(self.radius, int(sigma * math.sqrt(48 * math.log(2))))

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """(P, H, W) planes to (P, H, W), which the next call overwrites."""
        count, reach = x.shape[0], self.reach(sigma)
        edge, band, pitch = self.radius - reach, BLOCK + 2 * reach, self.padded.stride(1)
        inside = slice(self.radius, self.radius + self.height), slice(self.radius, self.radius + self.width)
        self.padded[:count, *inside].copy_(x)
        toeplitz = _toeplitz(sigma, reach, band)

        for plane, target in zip(self.padded[:count, edge:], self.halfway, strict=False):
            bands = _overlapping(plane, (self.row_blocks, band, pitch), (BLOCK * pitch, pitch, 1))
            torch.bmm(toeplitz.expand(self.row_blocks, -1, -1), bands, out=target.unflatten(0, (-1, BLOCK)))

        rows = self.halfway[:count, :, edge:].flatten(0, 1)
        bands = _overlapping(rows, (self.column_blocks, rows.shape[0], band), (BLOCK, pitch, 1))
        done = self.done[:count].flatten(0, 1).unflatten(1, (-1, BLOCK)).transpose(0, 1)
        torch.bmm(bands, toeplitz.t().expand(self.column_blocks, -1, -1), out=done)
        return self.done[:count, : self.height, : self.width]


def _overlapping(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return x.as_strided(size, stride, x.storage_offset())


def _toeplitz(sigma: float, reach: int, band: int) -> Tensor:
    """(BLOCK, band): row i holds the normalised taps from column i on."""
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    taps = torch.exp(offsets.square() / (-2 * sigma * sigma))
    rows = torch.zeros(BLOCK, band + 1, **FLOAT)
    rows[:, : 2 * reach + 1] = taps / taps.sum()
    return rows.flatten()[: BLOCK * band].view(BLOCK, band)
