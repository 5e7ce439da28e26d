"""A finished store, opened: its index, its shards, and exact frames for pictures and evaluation."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vito_fast.data.store.decode import BadPackets, Decoder, Picture, decode_jpeg
from vito_fast.data.store.description import open_index, read_description
from vito_fast.data.store.index import ClipInfo, Read, Reader

Numbers = npt.NDArray[np.int32] | npt.NDArray[np.int64]

AT_ONCE = 64
"""Frames read and decoded together by ``frames``."""


class Store:
    """``path`` opened for reading; ``threads`` read from its shards. Thread-safe.

    Raises UserError if it is no finished store, one of another version or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 4):
        self.path = Path(path)
        self.description = read_description(self.path)
        self.index = open_index(self.path)
        self.format = self.index.format
        self.reader = Reader(self.index, self.path, threads=threads)

    def __len__(self) -> int:
        return self.index.num_clips

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its clips and their pixels: equal for stores packed from equal files with equal options. How the
        packets are spread over shards is no part of it.
        """
        options = {name: value for name, value in self.description["options"].items() if name != "shard_mib"}
        return {"sources": self.description["sources"], **options}

    def decode(self, decoder: Decoder, clip: int, info: ClipInfo, read: Read, frames: Numbers) -> list[Picture]:
        """The frames that ``read`` was made for (``single_stream=False``), decoded in software, not turned.

        Raises BadPackets.
        """
        if self.format == "jpeg":
            packets = read.split()
            return [decode_jpeg(info, packets[picture]) for picture in read.pictures]
        try:
            order = self.index.packets(clip).order
        except ValueError as error:  # the reader has looked at the packets of these frames only
            raise BadPackets(str(error)) from None
        return decoder.decode(info, read, order[frames])


def frames(store: Store | str | os.PathLike[str], clip: int, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Picture:
    """Exactly decoded frames of one clip, (n, H, W, 3) uint8 RGB, upright, in the order asked for.

    ``numbers`` count frames in presentation order; repeats are allowed. What lies between frames close together is
    decoded once. Raises IndexError for a clip or frame that does not exist, OSError for damaged data.
    """
    store = store if isinstance(store, Store) else Store(store)
    info, decoder = store.index.clip(clip), Decoder()
    wanted, places = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
    pictures: list[Picture] = []
    for part in np.split(wanted, range(AT_ONCE, len(wanted), AT_ONCE)):
        if not len(part):
            continue
        (read,) = store.reader.read([clip], part[None], single_stream=False)
        if read.code != "ok":
            raise OSError(f"{store.path}: {read.error}")
        try:
            pictures += store.decode(decoder, clip, info, read, part)
        except BadPackets as error:
            raise OSError(f"{store.path}: clip {clip}: {error}") from None
    turned = [np.rot90(picture, -info.rotation // 90) for picture in pictures]
    height, width = (info.width, info.height) if info.rotation % 180 else (info.height, info.width)
    return np.stack([turned[place] for place in places]) if turned else np.empty((0, height, width, 3), np.uint8)
