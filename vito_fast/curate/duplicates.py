"""Near-duplicate clips: hashes are matched in a multi-band index, clips grouped in stars.

A star has one representative, and every member matches it. Groups are never transitive: a chain of small changes
does not join clips that look different.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vito_fast.curate.hashes import BYTES, SEARCHED, SEARCHED_EVERY, VARIANTS

Words = npt.NDArray[np.uint64]
"""(N, 4): the 256 bits of each hash."""

EXACT_PAIRS = 1 << 30
"""Up to so many pairs of hashes are compared one by one; beyond, only those that share a band."""
BAND_BITS = 24
BANDS = 10
BUCKET = 256
"""At most so many hashes of one band value are compared: the first in the order of the clips."""
CHUNK = 1 << 16
"""Queries matched at a time."""


@dataclass(frozen=True)
class DuplicateOptions:
    distance: int = 72
    """Most bits of 256 in which two frames' hashes differ."""
    share: float = 0.35
    """Least share of the shorter clip's frames that match."""
    contrast: float = 6.0
    """Least standard deviation of a frame's luma in levels; flat frames match everything and are left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.distance < 128:
            raise ValueError(f"distance is {self.distance}, must be 0 to 127 of 256 bits")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Match:
    """Clip ``other`` looks like ``clip``: frames of ``clip``'s ``variant`` match a ``share`` of the shorter clip."""

    clip: int
    other: int
    variant: int
    share: float
    distance: int
    """The least one of the matched frames, in bits."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The star of one clip. ``match`` is None for the representative itself."""

    representative: int
    match: Match | None


def as_words(hashes: npt.NDArray[np.uint8]) -> Words:
    """(N, 32) uint8 to (N, 4) uint64, the form in which hashes are compared."""
    return np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, BYTES // 8)


def distances(a: Words, b: Words) -> npt.NDArray[np.int64]:
    """Bits in which hashes differ; ``a`` and ``b`` broadcast except for the last axis."""
    return np.bitwise_count(a ^ b).sum(-1, dtype=np.int64)


def _band_keys(words: Words, band: int) -> npt.NDArray[np.uint32]:
    """24 of the 256 bits. Low frequencies survive alterations best, so the bands take them first, each in several."""
    octets = words.view(np.uint8).reshape(-1, BYTES)
    first, second, third = _BAND_OCTETS[band]
    return (
        octets[:, first].astype(np.uint32) << 16 | octets[:, second].astype(np.uint32) << 8 | octets[:, third]
    ).astype(np.uint32)


# Octet 2 r holds vertical frequency r and horizontal ones 0 to 7.
_BAND_OCTETS = ((0, 2, 4), (0, 6, 8), (2, 6, 10), (4, 8, 10), (0, 10, 12), (2, 8, 12), (4, 6, 14), (0, 2, 1),
                (4, 6, 3), (8, 10, 1))  # fmt: skip


@dataclass(frozen=True)
class ClipHashes:
    """Hashes of several clips, one row a frame and variant. ``clip`` and ``frame`` number clips and their frames."""

    clip: npt.NDArray[np.int32]
    frame: npt.NDArray[np.int32]
    variant: npt.NDArray[np.uint8]
    bits: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.clip)


def clip_hashes(number: int, hashes: list[dict[str, Any]], contrast: float) -> ClipHashes:
    """All hashes of one clip; flat frames are left out."""
    good = [(place, row["bits"]) for place, row in enumerate(hashes) if row["contrast"] >= contrast]
    count = len(VARIANTS)
    bits = np.frombuffer(b"".join(row for _, row in good), np.uint8).reshape(-1, BYTES)
    frame = np.repeat(np.array([place for place, _ in good], np.int32), count)
    variant = np.tile(np.arange(count, dtype=np.uint8), len(good))
    return ClipHashes(np.full(len(bits), number, np.int32), frame, variant, bits)


def searched_part(hashes: ClipHashes) -> ClipHashes:
    """The part of a clip's hashes that is searched: fewer frames and variants, equal ones once."""
    keep = (hashes.variant < SEARCHED) & (hashes.frame % SEARCHED_EVERY == 0)
    part = ClipHashes(hashes.clip[keep], hashes.frame[keep], hashes.variant[keep], hashes.bits[keep])
    fresh = np.ones(len(part), bool)
    for back in range(1, SEARCHED):
        same = (part.frame[back:] == part.frame[:-back]) & (part.bits[back:] == part.bits[:-back]).all(1)
        fresh[back:] &= ~same
    return ClipHashes(part.clip[fresh], part.frame[fresh], part.variant[fresh], part.bits[fresh])


def searched_side(batches: Callable[[], Iterable[ClipHashes]], clips: int) -> tuple[ClipHashes, npt.NDArray[np.int32]]:
    """The searched parts of all clips in their order, and the searched frames of each.

    ``batches`` is read twice and gives one clip at a time, so that nothing is in memory twice.
    """
    counts, sizes = np.zeros(clips, np.int64), np.zeros(clips, np.int32)
    for part in map(searched_part, batches()):
        if len(part):
            counts[part.clip[0]], sizes[part.clip[0]] = len(part), len(np.unique(part.frame))
    starts = np.cumsum(counts) - counts
    count = int(counts.sum())
    found = ClipHashes(
        np.repeat(np.arange(clips, dtype=np.int32), counts), np.empty(count, np.int32), np.empty(count, np.uint8),
        np.empty((count, BYTES), np.uint8),
    )  # fmt: skip
    for part in map(searched_part, batches()):
        if len(part):
            place = slice(starts[part.clip[0]], starts[part.clip[0]] + len(part))
            found.frame[place], found.variant[place], found.bits[place] = part.frame, part.variant, part.bits
    return found, sizes


def find_matches(
    searched: ClipHashes,
    batches: Callable[[], Iterable[ClipHashes]],
    sizes: npt.NDArray[np.int32],
    options: DuplicateOptions,
    *,
    exact_pairs: int = EXACT_PAIRS,
) -> list[Match]:
    """Pairs of clips that look alike.

    Args:
        searched: The side in memory, about 45 bytes a hash: 2 frames a second, the variants of ``hashes.SEARCHED``,
            in the order of the clips. They are numbered best first, see :func:`star_groups`.
        batches: Returns the queries, read once for each band: 6 frames a second, all variants. The clips of a batch
            ascend.
        sizes: (clips,) searched frames of each clip.
        exact_pairs: Pairs of hashes up to which all are compared. Beyond, two clips are compared in full once any of
            their frames share a band; that finds nearly all.

    Returns:
        Matches in the order of (clip, other). Two clips match if one variant of one clip's frames matches at least
        ``options.share`` of the searched frames of the shorter clip.
    """
    words = as_words(searched.bits)
    exact = len(words) * sum(map(len, batches())) <= exact_pairs
    found: list[npt.NDArray[np.int32]] = []
    known: set[tuple[int, int]] = set()
    for band in range(1 if exact else BANDS):
        near = _all_pairs(words, options.distance) if exact else _banded(words, band, options.distance)
        for batch in batches():
            queries = as_words(batch.bits)
            for rows, places, bits in near(queries):
                if exact:
                    found.append(_hits(batch, searched, rows, places, bits))
                    continue
                pairs = np.unique(np.stack([batch.clip[rows], searched.clip[places]], 1), axis=0)
                for clip, other in pairs[pairs[:, 0] != pairs[:, 1]].tolist():
                    if (clip, other) not in known:
                        known.add((clip, other))
                        (a, b), (c, d) = _span(batch.clip, clip), _span(searched.clip, other)
                        apart = distances(queries[a:b, None], words[None, c:d])
                        rows, places = np.nonzero(apart <= options.distance)
                        found.append(_hits(batch, searched, rows + a, places + c, apart[rows, places]))
    return _matches(np.concatenate(found), sizes, options) if found else []


def _span(clips: npt.NDArray[np.int32], clip: int) -> tuple[int, int]:
    first, last = np.searchsorted(clips, np.array([clip, clip + 1], clips.dtype))  # of one dtype, or clips is copied
    return int(first), int(last)


def _hits(batch: ClipHashes, searched: ClipHashes, rows: Any, places: Any, bits: Any) -> npt.NDArray[np.int32]:
    """(clip, other, variant, searched frame of other, bits) of each pair of hashes of two clips."""
    columns = (batch.clip[rows], searched.clip[places], batch.variant[rows], searched.frame[places], bits)
    hits = np.stack([np.asarray(column, np.int32) for column in columns], 1)
    return hits[hits[:, 0] != hits[:, 1]]


Near = Callable[[Words], Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]]
"""Queries to (query, searched hash, bits in which they differ)."""


def _all_pairs(words: Words, most: int) -> Near:
    def near(queries: Words):
        step = max(1, (1 << 20) // max(1, len(words)))
        for start in range(0, len(queries), step):
            bits = distances(queries[start : start + step, None], words[None])
            rows, places = np.nonzero(bits <= most)
            yield rows + start, places, bits[rows, places]

    return near


def _banded(words: Words, band: int, most: int) -> Near:
    keys = _band_keys(words, band)
    order = np.argsort(keys, kind="stable").astype(np.uint32)
    keys = keys[order]

    def near(queries: Words):
        for start in range(0, len(queries), CHUNK):
            part = queries[start : start + CHUNK]
            wanted = _band_keys(part, band)
            first = np.searchsorted(keys, wanted, "left")
            count = np.minimum(np.searchsorted(keys, wanted, "right") - first, BUCKET)
            rows = np.repeat(np.arange(len(wanted)), count)
            offsets = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
            places = order[np.repeat(first, count) + offsets].astype(np.int64)
            bits = distances(part[rows], words[places])
            keep = bits <= most
            yield rows[keep] + start, places[keep], bits[keep]

    return near


def _matches(hits: npt.NDArray[np.int32], sizes: npt.NDArray[np.int32], options: DuplicateOptions) -> list[Match]:
    """``hits``: (clip, other, variant, searched frame of other, bits); each frame counts once."""
    if not len(hits):
        return []
    hits = hits[np.lexsort(hits.T[::-1])]
    fresh = np.r_[True, (hits[1:, :4] != hits[:-1, :4]).any(1)]
    hits = hits[fresh]
    starts = np.flatnonzero(np.r_[True, (hits[1:, :3] != hits[:-1, :3]).any(1)])
    counts = np.diff(np.r_[starts, len(hits)])
    nearest = np.minimum.reduceat(hits[:, 4], starts)
    pairs = hits[starts, :3]
    shares = np.minimum(1.0, counts / np.maximum(np.minimum(sizes[pairs[:, 0]], sizes[pairs[:, 1]]), 1))
    best: dict[tuple[int, int], Match] = {}
    for place in np.flatnonzero(shares >= options.share):
        clip, other, variant = pairs[place].tolist()
        match = Match(clip, other, variant, float(shares[place]), int(nearest[place]))
        known = best.get((clip, other))
        if known is None or (-match.share, match.distance) < (-known.share, known.distance):
            best[clip, other] = match
    return [best[key] for key in sorted(best)]


def star_groups(count: int, matches: Sequence[Match]) -> list[Membership]:
    """The star of each of ``count`` clips, numbered in the fixed order of (resolution, score, id), best first.

    A clip that no earlier representative matches is a representative; every later clip that matches it joins, unless
    an earlier representative has it. Depends on the order of the clips and the set of matches only.
    """
    neighbors: dict[int, dict[int, Match]] = {}
    for match in sorted(matches, key=lambda m: (-m.share, m.distance, m.variant, m.clip, m.other)):
        for a, b in ((match.clip, match.other), (match.other, match.clip)):
            neighbors.setdefault(a, {}).setdefault(b, match)
    groups: list[Membership | None] = [None] * count
    for clip in range(count):
        if groups[clip] is None:
            groups[clip] = Membership(clip, None)
            for other, match in neighbors.get(clip, {}).items():
                if other > clip and groups[other] is None:
                    groups[other] = Membership(clip, match)
    return [group for group in groups if group is not None]
