"""A finished store, opened: its index, its shards, and exact frames for pictures and evaluation."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vito_fast.data.decode import Decoder
from vito_fast.data.index import Index, Reader
from vito_fast.data.pack import read_description
from vito_fast.errors import UserError


class Store:
    """``path`` opened for reading. Raises UserError if it is no finished store, or one of another version."""

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 2):
        self.path = Path(path)
        self.description = read_description(self.path)
        try:
            self.index = Index(self.path / "index.bin")
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path / 'index.bin'} cannot be used: {error}; pack the store again") from None
        self.format = self.index.format
        self.reader = Reader(self.index, self.path, threads=threads)

    def __len__(self) -> int:
        return self.index.num_clips


def frames(store: Store | str | os.PathLike[str], clip: int, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Exactly decoded frames of one clip, (n, H, W, 3) uint8 RGB, upright, in the order asked for.

    ``numbers`` count frames in presentation order; repeats are allowed. Raises IndexError for a clip or frame that does
    not exist, OSError for damaged data.
    """
    store = store if isinstance(store, Store) else Store(store)
    info, order, decoder = store.index.clip(clip), store.index.packets(clip).order, Decoder()
    asked = np.asarray(numbers, np.int64)
    result = {}
    for number in np.unique(asked):
        (read,) = store.reader.read(np.array([clip]), np.array([[number]]), single_stream=False)
        if read.code != "ok":
            raise OSError(read.error)
        (frame,) = decoder.decode(info, read, order[[number]])
        result[int(number)] = np.rot90(frame, -info.rotation // 90)
    return np.stack([result[int(number)] for number in asked])
