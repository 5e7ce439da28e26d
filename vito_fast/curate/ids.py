"""Ids in sorted columns: a million take 30 MB, in a dict several times as much."""

from collections.abc import Iterable, Sequence

import numpy as np

WIDTH = 24
"""Characters of an id, see :func:`vito_fast.curate.options.digest`."""


class IdTable:
    """The places of ids in a sequence that may hold an id several times."""

    def __init__(self, ids: Iterable[str]):
        names = np.frombuffer(bytearray().join(name.encode() for name in ids), f"S{WIDTH}")
        self._order = np.argsort(names, kind="stable").astype(np.int32)
        self._names = names[self._order]

    def find(self, name: str) -> list[int]:
        """The places of ``name`` in their order; none if it is unknown."""
        wanted = name.encode()
        start = int(np.searchsorted(self._names, wanted))
        end = start
        while end < len(self._names) and self._names[end] == wanted:
            end += 1
        return [int(place) for place in self._order[start:end]]


class Wanted:
    """The candidates of each file that have no state yet."""

    def __init__(self, rows: Iterable[tuple[str, str, Sequence[int]]]):
        """``rows``: a file's item id, the id of a candidate of it, and the classes of the candidate's query."""
        items, candidates, sets = bytearray(), bytearray(), dict[tuple[int, ...], int]()
        numbers = []
        for item, candidate, classes in rows:
            items += item.encode()
            candidates += candidate.encode()
            numbers.append(sets.setdefault(tuple(classes), len(sets)))
        self._items = IdTable(str(items[at : at + WIDTH], "ascii") for at in range(0, len(items), WIDTH))
        self._candidates = np.frombuffer(candidates, f"S{WIDTH}")
        self._sets, self._set = list(sets), np.array(numbers, np.int32)
        self._pixels = np.zeros(len(numbers), np.int64)
        self._open = np.ones(len(numbers), bool)

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and any(self._open[place] for place in self._items.find(item))

    def __len__(self) -> int:
        return int(self._open.sum())

    def note(self, item: str, pixels: int) -> None:
        """The pixels of a frame of a file."""
        self._pixels[self._items.find(item)] = pixels

    def pop(self, item: str) -> list[tuple[str, tuple[int, ...], int]]:
        """The candidates of a file, their classes, and the pixels noted; they are wanted no longer."""
        places = [place for place in self._items.find(item) if self._open[place]]
        self._open[places] = False
        return [
            (str(self._candidates[place], "ascii"), self._sets[self._set[place]], int(self._pixels[place]))
            for place in places
        ]
