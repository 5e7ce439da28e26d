"""Label propagation: labels of the first frame follow the video along feature similarity.

Each query position of a new frame takes the labels of its ``topk`` most similar positions in earlier frames, weighted
by the softmax of their cosine similarities over ``temperature``. Only keys inside a spatial window around the query
count. Three published variants differ in small ways that move the score; each is a :class:`Preset`:

- ``vfs``: Xu & Wang, "Rethinking Self-supervised Correspondence Learning" (2021). The paper of VITO uses it unchanged.
- ``crw``: Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk" (2020).
- ``dino``: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021).

Traps: the range "36" of VFS is a diameter. Early in a video VFS reads frame 0 twice and CRW pads with it; both change
the top-k. CRW's window leaves the first frame free. DINO keeps every key that ties with its k-th.

Queries go in square tiles that meet only the keys of their window, so the affinity of a frame is never whole. Keys lie
in vertical strips with the frames innermost. A tile's window is then a few contiguous blocks, and the maximum over the
frames of one position prunes the search without changing its result.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

TILE = 12
"""Side of a query tile. Larger tiles share more of a window; smaller ones waste less of it."""
STRIP = 6
"""Columns of a strip of keys: half a tile keeps what a window reads beyond itself small."""


@dataclass(frozen=True)
class Preset:
    """One published protocol of label propagation."""

    window: Literal["circle", "square"] = "circle"
    """``circle`` admits keys at distance < ``radius``, ``square`` at Chebyshev distance <= ``radius``."""
    radius: float = 18.0
    """Of the window, in feature positions. VFS states a range of 36, a diameter (24 with its ResNet-18)."""
    window_first: bool = True
    """Whether the window also limits the keys of the first frame."""
    memory: int = 20
    """Preceding frames in the context, besides the first."""
    early: Literal["repeat", "pad", "distinct"] = "repeat"
    """The memory before it is full. ``repeat``: all frames so far, so that frame 0 counts twice. ``pad``: frame 0 in
    every free place. ``distinct``: all frames so far but frame 0."""
    first_labels: Literal["nearest", "bilinear"] = "nearest"
    """How the first mask becomes labels: ``nearest``, then one-hot, or one-hot, then ``bilinear``."""
    topk: int = 10
    """Keys that a query takes."""
    keep_ties: bool = False
    """Whether keys that equal the k-th are kept too."""
    temperature: float = 0.07
    """Of the softmax over the kept keys."""
    min_max: bool = True
    """Whether each channel with a positive maximum is scaled to [0, 1] after upsampling."""
    upsample: Literal["original", "stride"] = "original"
    """``original``: bilinear to the original size. ``stride``: bilinear to the input size, and the ids then by nearest
    neighbor to the original size."""
    resize: Literal["short", "multiple", "none"] = "short"
    """``short``: 480 pixels high, ratio kept. ``multiple``: 480 on the short side, a multiple of 64 on the long one.
    ``none``: as it is."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of the input's normalization, RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Likewise. DINO's has .228 for red."""

    def __post_init__(self) -> None:
        if self.topk < 1 or self.memory < 1 or self.temperature <= 0 or self.radius < 0:
            raise ValueError(f"topk, memory, temperature must be positive and radius not negative, not {self}")


PRESETS: dict[str, Preset] = {
    "vfs": Preset(),
    "crw": Preset(
        radius=12.0,
        window_first=False,
        early="pad",
        first_labels="bilinear",
        temperature=0.05,
        min_max=False,
        resize="none",
    ),
    "dino": Preset(
        window="square",
        radius=12.0,
        memory=7,
        early="distinct",
        topk=5,
        keep_ties=True,
        temperature=0.1,
        upsample="stride",
        resize="multiple",
        std=(0.228, 0.224, 0.225),
    ),
}
"""The published protocols by name; the fields that are not named are VFS's."""


def preset_of(preset: str | Preset) -> Preset:
    """The preset of that name, or the one given. ValueError if there is none of that name."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"no label propagation preset {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def context_frames(t: int, preset: Preset) -> list[int]:
    """The frames that frame ``t`` (at least 1) reads: first frame 0, then its memory, with repetitions."""
    recent = range(t - preset.memory, t)
    match preset.early:
        case "repeat":
            return [0, *(i for i in recent if i >= 0)]
        case "pad":
            return [0, *(max(i, 0) for i in recent)]
        case "distinct":
            return [0, *(i for i in recent if i >= 1)]


def step(query: Tensor, context: Tensor, labels: Tensor, preset: str | Preset = "vfs") -> Tensor:
    """Labels of one frame from those of its context.

    Args:
        query: features of the new frame, (C, h, w), any floating dtype, not normalized.
        context: features of the context, (N, C, h, w), the first frame of the video first.
        labels: labels of the context, (N, L, h, w).
        preset: a name in :data:`PRESETS` or a :class:`Preset`.

    Returns:
        (L, h, w) float32: at each position a weighted mean of labels. Deterministic on a CPU.
    """
    if context.ndim != 4 or query.shape != context.shape[1:]:
        raise ValueError(f"query must be (C, h, w) and context (N, C, h, w), not {query.shape} and {context.shape}")
    if labels.ndim != 4 or labels.shape[::2] != (len(context), query.shape[1]) or labels.shape[3] != query.shape[2]:
        raise ValueError(f"labels must be (N, L, h, w) like context {context.shape}, not {labels.shape}")
    keys = normalize(query)
    memory = Memory(preset_of(preset), len(context), labels.shape[1], keys)
    for slot in range(len(context)):
        memory.write(slot, normalize(context[slot]), labels[slot])
    return memory.read(keys)


def propagate_features(
    features: Iterable[Tensor], first_labels: Tensor, preset: str | Preset = "vfs"
) -> Iterator[Tensor]:
    """Labels of every frame of a video, of the first as given.

    Args:
        features: of the frames in order, each (C, h, w) or (1, C, h, w). Read one at a time; a generator keeps only
            the context in memory. bfloat16 on CUDA gives bfloat16 products with float32 sums.
        first_labels: (L, h, w), see :func:`first_labels`.
        preset: a name in :data:`PRESETS` or a :class:`Preset`.

    Yields:
        (L, h, w) float32 per frame.
    """  # fmt: skip
    preset = preset_of(preset)
    memory: Memory | None = None
    slots: list[int] = []
    for t, feature in enumerate(features):
        keys = normalize(feature.reshape(feature.shape[-3:]))
        labels = first_labels.float()
        if memory is None:
            if keys.shape[1:] != labels.shape[1:]:
                raise ValueError(f"features of {tuple(keys.shape)} do not fit labels of {tuple(labels.shape)}")
            memory = Memory(preset, preset.memory + 1, len(labels), keys)
        else:
            labels = memory.read(keys, len(slots))
        yield labels
        # Slot 0 holds frame 0 for good, the others are a ring. Order inside the context does not matter.
        following = context_frames(t + 1, preset)
        for slot in _places(t, len(following), preset):
            memory.write(slot, keys, labels)
        slots = following


def _places(t: int, used: int, preset: Preset) -> Iterable[int]:
    """Slots of the memory that frame ``t`` fills."""
    if t == 0:
        return range(used)
    return [1 + (t - (preset.early == "distinct")) % preset.memory]


def normalize(features: Tensor) -> Tensor:
    """Features of unit length along the first axis: 16-bit ones on CUDA in their dtype, all others in float32."""
    low = features.device.type == "cuda" and features.dtype in (torch.bfloat16, torch.float16)
    return F.normalize(features.float(), dim=0).to(features.dtype if low else torch.float32)


@dataclass(frozen=True)
class _Region:
    """A tile of queries and the keys that it meets.

    Args:
        rows: of the queries.
        columns: of the queries.
        blocks: (strip, top row, bottom row) of the keys.
        positions: (P,) indices of the key positions in a memory's layout, block after block.
        outside: (Q, P) or (1, P), true for a key outside the window of the query.
    """

    rows: slice
    columns: slice
    blocks: list[tuple[int, int, int]]
    positions: Tensor
    outside: Tensor


class Memory:
    """Features and labels of a context, laid out for windows: (strip, row, column in the strip, slot, channel).

    Args:
        preset: the protocol.
        slots: frames of the context at most.
        channels: of the labels, L.
        like: a (C, h, w) tensor with the features' size, dtype and device.
    """

    def __init__(self, preset: Preset, slots: int, channels: int, like: Tensor) -> None:
        c, self.height, self.width = like.shape
        self.preset, self.slots, self.strips = preset, slots, -(-self.width // STRIP)
        shape = self.strips, self.height, STRIP, slots
        self.keys = torch.zeros(*shape, c, dtype=like.dtype, device=like.device)
        self.labels = torch.zeros(*shape, channels, device=like.device)
        self.tiles = [self._tile(y, x) for y in range(0, self.height, TILE) for x in range(0, self.width, TILE)]
        everywhere = [(strip, 0, self.height) for strip in range(self.strips)]
        self.everywhere = self._region(slice(0, 0), slice(0, 0), everywhere)

    def write(self, slot: int, features: Tensor, labels: Tensor) -> None:
        """Puts normalized features (C, h, w) and labels (L, h, w) into a slot."""
        for store, value in ((self.keys, features), (self.labels, labels)):
            # The last strip may be incomplete. Its other columns stay zero, and no window admits them.
            for strip in range(self.strips):
                columns = value[:, :, strip * STRIP : (strip + 1) * STRIP]
                store[strip, :, : columns.shape[2], slot] = columns.permute(1, 2, 0)

    def read(self, query: Tensor, used: int | None = None) -> Tensor:
        """Labels (L, h, w) of a frame with normalized features ``query`` (C, h, w), from the first ``used`` slots."""
        used = self.slots if used is None else used
        first = 0 if self.preset.window_first else 1
        free = list(self._keys(self.everywhere, 0, first)) if first else []
        result = torch.empty(self.height, self.width, self.labels.shape[-1], device=query.device)
        for tile in self.tiles:
            queries = query[:, tile.rows, tile.columns]
            size = queries.shape[1:]
            queries = queries.flatten(1).T.contiguous()
            found = [self._search(queries, free, self.everywhere, 0, first)] if first else []
            if used > first:
                found.append(self._search(queries, self._keys(tile, first, used), tile, first, used))
            values, labels = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
            result[tile.rows, tile.columns] = _blend(values, labels, self.preset).unflatten(0, size)
        return result.permute(2, 0, 1)

    def _keys(self, region: _Region, first: int, last: int) -> Iterator[Tensor]:
        """The keys of each block of a region in the slots from first to last, (positions x slots, C)."""
        for strip, top, bottom in region.blocks:
            yield self.keys[strip, top:bottom, :, first:last].reshape(-1, self.keys.shape[-1])

    def _search(
        self, queries: Tensor, blocks: Iterable[Tensor], region: _Region, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """Similarities (Q, K) and labels (Q, K, L) of the best keys of a region in the slots from first to last."""
        slots = last - first
        # float32 also for bfloat16 features: a similarity of 8 bits over a temperature of .07 would be 5 % off.
        affinity = torch.empty(len(queries), len(region.positions) * slots, device=queries.device)
        at = 0
        for keys in blocks:
            out = affinity[:, at : at + len(keys)]
            if keys.device.type == "cuda" and keys.dtype != torch.float32:
                out.copy_(torch.mm(queries, keys.T, out_dtype=torch.float32))
            else:
                torch.mm(queries.float(), keys.T.float(), out=out)
            at += len(keys)
        values, position, slot = _top(affinity.unflatten(1, (-1, slots)), region.outside, self.preset)
        return values, self.labels.flatten(0, 2)[region.positions[position], slot + first]

    def _tile(self, top: int, left: int) -> _Region:
        """The queries from (top, left) on. A circle reads fewer rows of the strips that are further from them."""
        bottom, right = min(top + TILE, self.height), min(left + TILE, self.width)
        radius, circle = self.preset.radius, self.preset.window == "circle"
        reach = math.ceil(radius) - 1 if circle else math.floor(radius)
        blocks = []
        for strip in range(max(left - reach, 0) // STRIP, (min(right + reach, self.width) - 1) // STRIP + 1):
            gap = max(left - (strip * STRIP + STRIP - 1), strip * STRIP - (right - 1), 0)
            rows = max(n for n in range(reach + 1) if n == 0 or not circle or n**2 + gap**2 < radius**2)
            blocks.append((strip, max(top - rows, 0), min(bottom + rows, self.height)))
        return self._region(slice(top, bottom), slice(left, right), blocks)

    def _region(self, rows: slice, columns: slice, blocks: list[tuple[int, int, int]]) -> _Region:
        grid = torch.arange(self.strips * self.height * STRIP).view(self.strips, self.height, STRIP)
        positions = torch.cat([grid[strip, top:bottom].flatten() for strip, top, bottom in blocks])
        y = positions // STRIP % self.height
        x = positions // (STRIP * self.height) * STRIP + positions % STRIP
        outside = (x >= self.width).unsqueeze(0)
        if rows.stop:
            size = rows.stop - rows.start, columns.stop - columns.start
            dy = y - torch.arange(rows.start, rows.stop)[:, None].expand(size).reshape(-1, 1)
            dx = x - torch.arange(columns.start, columns.stop).expand(size).reshape(-1, 1)
            if self.preset.window == "circle":
                outside = outside | (dy**2 + dx**2 >= self.preset.radius**2)
            else:
                outside = outside | (torch.maximum(dy.abs(), dx.abs()) > self.preset.radius)
        device = self.keys.device
        return _Region(rows, columns, blocks, positions.to(device), outside.to(device))


def _top(affinity: Tensor, outside: Tensor, preset: Preset) -> tuple[Tensor, Tensor, Tensor]:
    """The best keys of each query: similarities, positions and slots, each (Q, K).

    A key among the best k lies at a position whose maximum over the slots is among the best k, so the search reads
    ``affinity`` (Q, P, slots) once and sorts only P maxima and k x slots candidates.
    """
    slots = affinity.shape[2]
    best = affinity.amax(2).masked_fill_(outside, -math.inf)
    reserve, position = best.topk(min(preset.topk, best.shape[1]), 1)

    def candidates() -> Tensor:
        values = affinity.gather(1, position[:, :, None].expand(-1, -1, slots))
        return values.masked_fill_(reserve.isinf()[:, :, None], -math.inf).flatten(1)

    values = candidates()
    k = min(preset.topk, values.shape[1])
    if preset.keep_ties:
        threshold = values.topk(k, 1).values[:, -1:]
        reserve, position = best.topk(max(int((best >= threshold).sum(1).max()), 1), 1)
        values = candidates()
        k = max(int((values >= threshold).sum(1).max()), 1)
    values, index = values.topk(k, 1)
    return values, position.gather(1, index // slots), index % slots


def _blend(values: Tensor, labels: Tensor, preset: Preset) -> Tensor:
    """Means (Q, L) of labels (Q, K, L) under the softmax of the best of ``values`` (Q, K)."""
    k = min(preset.topk, values.shape[1])
    if preset.keep_ties:
        values = values.masked_fill(values < values.topk(k, 1).values[:, -1:], -math.inf)
    else:
        values, index = values.topk(k, 1)
        labels = labels.gather(1, index[:, :, None].expand(-1, -1, labels.shape[2]))
    return torch.bmm((values / preset.temperature).softmax(1).unsqueeze(1), labels).squeeze(1)


def first_labels(mask: Tensor, size: tuple[int, int], preset: str | Preset = "vfs") -> Tensor:
    """Labels of the first frame at the size of the features.

    Args:
        mask: (H, W) integer ids, 0 for the background.
        size: (h, w) of the features.
        preset: a name in :data:`PRESETS` or a :class:`Preset`.

    Returns:
        (1 + largest id, h, w) float32. Nearest neighbor takes the pixel at the center, as Pillow does.
    """
    one_hot = F.one_hot(mask.long()).permute(2, 0, 1)[None].float()
    if preset_of(preset).first_labels == "nearest":
        return F.interpolate(one_hot, size, mode="nearest-exact")[0]
    return F.interpolate(one_hot, size, mode="bilinear", align_corners=False)[0]


def to_mask(labels: Tensor, original: tuple[int, int], inputs: tuple[int, int], preset: str | Preset = "vfs") -> Tensor:
    """Object ids at the original size.

    Args:
        labels: (L, h, w) of one frame.
        original: height and width of the video.
        inputs: height and width of the encoder's input.
        preset: a name in :data:`PRESETS` or a :class:`Preset`.

    Returns:
        (H, W) uint8.
    """
    preset = preset_of(preset)
    size = original if preset.upsample == "original" else inputs
    scores = F.interpolate(labels[None], size, mode="bilinear", align_corners=False)[0]
    if preset.min_max:
        low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
        # A channel without a positive score stays as it is. A constant one says nothing about the place.
        scores = torch.where(high > 0, (scores - low) / (high - low + 1e-12), scores)
    ids = scores.argmax(0).to(torch.uint8)
    return F.interpolate(ids[None, None], original, mode="nearest-exact")[0, 0]


def prepare(frame: Tensor, preset: str | Preset = "vfs") -> Tensor:
    """The encoder's input for one frame, (1, 3, H', W') float32, normalized.

    Args:
        frame: (H, W, 3) uint8 RGB.
        preset: a name in :data:`PRESETS` or a :class:`Preset`. Resizing is bilinear without antialiasing, as in the
            official code.
    """
    preset = preset_of(preset)
    image = frame.permute(2, 0, 1)[None].float() / 255
    size = input_size(frame.shape[0], frame.shape[1], preset)
    if size != image.shape[2:]:
        image = F.interpolate(image, size, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(value, device=frame.device).view(3, 1, 1) for value in (preset.mean, preset.std))
    return (image - mean) / std


def input_size(height: int, width: int, preset: Preset) -> tuple[int, int]:
    """Height and width of the encoder's input for a video of that size."""
    match preset.resize:
        case "none":
            return height, width
        case "short":
            return 480, round(width * 480 / height)
        case "multiple":
            long = max(height, width) * 480 // min(height, width) // 64 * 64
            return (long, 480) if height > width else (480, long)
