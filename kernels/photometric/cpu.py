"""The CPU path of :mod:`vito_kernels.photometric`: one image at a time, in buffers that stay in the second-level cache.

A 224-pixel image is three float32 planes of 200 kB, so every operation is a vectorized pass over data in the cache and
costs microseconds. Each operator divides it among PyTorch's threads; a thread for each image loses as much to the
interpreter's lock. Buffers are kept between calls, since to touch new memory takes as long as an image.

- HSV is never formed. With V and C the largest channel and the largest minus the smallest, saturation times f moves
  every channel to ``V - (V - x) min(f, V / C)``. Hue takes the identity in ``_Color._hue``, without a branch.
- Blur is two banded matrix products. 16 output rows (then columns) need 16 + 2 radius input rows, and all these blocks
  share one small Toeplitz matrix. Taps below 2^-24 of the center are left out, so small sigmas cost less.
- A gray image is blurred and solarized as one plane.
"""

import math
from collections.abc import Sequence
from threading import local
from typing import Any

import torch
from torch import Tensor

from vito_kernels.reference import GRAY_WEIGHTS, ORDERS

BLOCK = 16  # rows or columns of a block of the blur: the width of a float32 vector, and close to the fewest operations
FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # not the caller's default
MAX_CACHED_PIXELS = 1 << 18  # of an image and its padding; each call allocates the 16 planes of a larger one
TINY = 1e-30  # for a chroma of zero, where any finite quotient gives the same color


def photometric(
    images: Tensor, params: Tensor, radius: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(B, H, W, 3) uint8 to (B, H, W, 3) ``dtype``; the arguments of the public function, checked."""
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    tables = params.tolist(), _hues(params[:, 3]), _toeplitz(params[:, 6], radius)
    mean_C11, std_C11 = (torch.tensor(x, **FLOAT).view(3, 1, 1) for x in (mean, std))
    with torch.inference_mode():  # spares every operator its look at autograd
        augment = _augment(images.shape[1], images.shape[2], radius)
        for image, row, hues, toeplitz, target in zip(images.unbind(), *tables, out.unbind(), strict=True):
            x = augment(image, row, hues, toeplitz, mean_C11, std_C11).to(dtype)
            for plane, channel in zip(x.unbind(), target.unbind(-1), strict=True):  # faster than one permuted copy
                channel.copy_(plane)
    return out


class _Augment:
    """The whole chain for one image after the other, with buffers of its own."""

    def __init__(self, height: int, width: int, radius: int):
        self.size = height, width, radius
        self.color, self.blur = _Color(height, width), _Blur(height, width, radius)

    def __call__(
        self, image: Tensor, row: Sequence[float], hues: Tensor, toeplitz: Tensor, mean_C11: Tensor, std_C11: Tensor
    ) -> Tensor:
        """An image (H, W, 3) uint8 to planes (3, H, W), which the next call overwrites.

        ``hues`` and ``toeplitz`` are made of the ``row`` of parameters.
        """
        *jitter, order, gray, sigma, threshold = row
        x = self.color(image, jitter, int(order), hues, gray > 0)
        reach = self.blur.reach(sigma)
        if reach > 0:
            x = self.blur(x, toeplitz, reach)
        if threshold <= 1:
            _solarize(x, threshold)
        return torch.sub(x, mean_C11, out=self.color.planes).div_(std_C11)


_cached = local()


def _augment(height: int, width: int, radius: int) -> _Augment:
    """This thread's: the one of its last call, if the size is the same."""
    augment = getattr(_cached, "augment", None)
    if augment is None or augment.size != (height, width, radius):
        augment = _Augment(height, width, radius)
        if (height + 2 * radius) * (width + 2 * radius) <= MAX_CACHED_PIXELS:
            _cached.augment = augment
    return augment


class _Color:
    """Jitter and gray. Every operation's result lies in [0, 1], as the planes do, but for rounding; only the first two
    need a clip.
    """

    def __init__(self, height: int, width: int):
        self.planes = torch.empty(3, height, width, **FLOAT)
        self.scratch = torch.empty(4, height, width, **FLOAT)
        self.red_green_blue = self.planes.unbind()
        self.top, self.bottom, self.chroma, self.side = self.scratch.unbind()
        self.top_C, self.ratio_C = self.top.expand(3, -1, -1), self.chroma.expand(3, -1, -1)
        self.gray_weights = torch.tensor(GRAY_WEIGHTS, **FLOAT)

    def __call__(self, image: Tensor, amounts: Sequence[float], order: int, hues: Tensor, gray: bool) -> Tensor:
        """(H, W, 3) uint8 to planes (3, H, W), or (1, H, W) if gray, that the next call overwrites."""
        x = self.planes.copy_(image.permute(2, 0, 1)).div_(255)
        brightness, contrast, saturation, _ = amounts
        for operation in ORDERS[order] if order >= 0 else ():
            if operation == 0:
                x.add_(brightness).clamp_(0, 1)
            elif operation == 1:
                rest = x.mean((1, 2), keepdim=True).mul_(1 - contrast)
                torch.add(rest, x, alpha=contrast, out=x).clamp_(0, 1)
            elif operation == 2:
                self._saturation(x, saturation)
            else:
                self._hue(x, hues)
        if not gray:
            return x
        torch.mv(x.flatten(1).t(), self.gray_weights, out=self.top.flatten())
        return self.scratch[:1]

    def _saturation(self, x: Tensor, factor: float) -> None:
        torch.amax(x, 0, out=self.top)
        if factor <= 1:
            x.lerp_(self.top_C, 1 - max(factor, 0.0))
            return
        torch.amin(x, 0, out=self.bottom)
        torch.sub(self.top, self.bottom, out=self.chroma).clamp_min_(TINY)
        torch.div(self.top, self.chroma, out=self.chroma).clamp_max_(factor)
        torch.lerp(self.top_C, x, self.ratio_C, out=x)

    def _hue(self, x: Tensor, hues: Tensor) -> None:
        """Shifts the hue by ``hues`` (see :func:`_hues`).

        With chroma C and smallest channel m, the hue lies ``|u| = (C - m + g + b - r) / C`` sixths of a turn from red,
        on the side of green if g > b. The channel of hue o becomes ``m + C clip(2 - d, 0, 1)``. d is the distance from
        u to o round the circle of six, ``3 - ||u - o| - 3|`` while u - o stays within one turn.
        """
        r, g, b = self.red_green_blue
        bottom, chroma, side = self.bottom, self.chroma, self.side
        torch.amin(x, 0, out=bottom)
        torch.sub(torch.amax(x, 0, out=self.top), bottom, out=chroma)
        torch.sub(g, b, out=side)
        u = torch.add(g, b, out=self.top).sub_(r).sub_(bottom).add_(chroma)
        chroma.clamp_min_(TINY)
        u.div_(chroma).copysign_(side)
        bottom.sub_(chroma)
        torch.sub(u, hues, out=x).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(bottom, chroma, x, out=x)


def _hues(turns: Tensor) -> Tensor:
    """(B, 3, 1, 1): each channel's own hue less the shift, in sixths of a turn.

    Thirds of a turn merely rename the channels. The rest of the shift is at most one sixth either way. So a hue less
    its channel's own stays within one turn.
    """
    turns = turns.double()[:, None]
    thirds = (3 * turns).round()
    own = (2 * (torch.arange(3, device="cpu") - thirds) + 3).remainder(6) - 3
    return (own - (6 * turns - 2 * thirds)).float()[:, :, None, None]


def _solarize(x: Tensor, threshold: float) -> None:
    over = x.clone().ge_(threshold if threshold > 0 else -1.0)  # rounding leaves some of x below 0
    x.addcmul_(x, over, value=-2).add_(over)


class _Blur:
    """Separable Gaussian by banded matrix products over zero-padded planes."""

    def __init__(self, height: int, width: int, radius: int):
        self.height, self.width, self.radius = height, width, radius
        self.row_blocks, self.column_blocks = -(-height // BLOCK), -(-width // BLOCK)
        rows, columns = self.row_blocks * BLOCK, self.column_blocks * BLOCK
        self.padded = torch.zeros(3, rows + 2 * radius, columns + 2 * radius, **FLOAT)
        self.inside = self.padded[:, radius : radius + height, radius : radius + width]
        self.halfway = torch.empty(3, rows, columns + 2 * radius, **FLOAT)
        self.done = torch.empty(3, rows, columns, **FLOAT)
        self.views: dict[tuple[int, int], Any] = {}  # a cached method would be a cycle, and hold on to the buffers

    def reach(self, sigma: float) -> int:
        """Taps on each side that are at least 2^-24 of the one in the middle."""
        return min(self.radius, int(sigma * math.sqrt(48 * math.log(2))))

    def __call__(self, x: Tensor, toeplitz: Tensor, reach: int) -> Tensor:
        """(P, H, W) planes to (P, H, W), which the next call overwrites."""
        count, edge = x.shape[0], self.radius - reach
        self.inside[:count].copy_(x)
        toeplitz = toeplitz[:, edge : edge + BLOCK + 2 * reach]
        if (count, reach) not in self.views:
            self.views[count, reach] = self._views(count, reach)
        by_rows, bands, done, result = self.views[count, reach]
        left = toeplitz.expand(self.row_blocks, -1, -1)
        for plane_bands, target in by_rows:
            torch.bmm(left, plane_bands, out=target)
        torch.bmm(bands, toeplitz.t().expand(self.column_blocks, -1, -1), out=done)
        return result

    def _views(self, count: int, reach: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]:
        """Views of ``count`` planes.

        First the overlapping bands of rows of each plane, with the output of their products. Then the bands of columns
        of all planes, their output, and the result.
        """
        edge, band, pitch = self.radius - reach, BLOCK + 2 * reach, self.padded.stride(1)
        by_rows = [
            (
                _overlapping(plane, (self.row_blocks, band, pitch), (BLOCK * pitch, pitch, 1)),
                target.unflatten(0, (-1, BLOCK)),
            )
            for plane, target in zip(self.padded[:count, edge:], self.halfway, strict=False)
        ]
        rows = self.halfway[:count, :, edge:].flatten(0, 1)
        bands = _overlapping(rows, (self.column_blocks, rows.shape[0], band), (BLOCK, pitch, 1))
        done = self.done[:count].flatten(0, 1).unflatten(1, (-1, BLOCK)).transpose(0, 1)
        return by_rows, bands, done, self.done[:count, : self.height, : self.width]


def _overlapping(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return x.as_strided(size, stride, x.storage_offset())


def _toeplitz(sigma: Tensor, radius: int) -> Tensor:
    """(B, BLOCK, BLOCK + 2 radius). Row i holds an image's normalized taps from column i on, NaN without a blur."""
    band = BLOCK + 2 * radius
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    taps = torch.exp(offsets.square() / (-2 * sigma.double().square()[:, None]))
    rows = torch.zeros(len(sigma), BLOCK, band + 1, **FLOAT)
    rows[:, :, : 2 * radius + 1] = (taps / taps.sum(1, keepdim=True))[:, None]
    return rows.flatten(1)[:, : BLOCK * band].unflatten(1, (BLOCK, band))
