"""An opened store: its index, its shards, and exactly decoded frames."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vito_fast.data.formats import FORMATS
from vito_fast.data.store.decode import BadPackets, Decoder, Picture, decode_jpeg
from vito_fast.data.store.description import damaged, open_index, read_description
from vito_fast.data.store.index import ClipInfo, Read, Reader

Numbers = npt.NDArray[np.int32] | npt.NDArray[np.int64]

DECODE_CHUNK = 64
"""Frames that :func:`frames` reads and decodes together. Bounds its memory."""


class Store:
    """A store opened for reading. Thread-safe.

    Args:
        path: Folder written by ``vito-fast pack``.
        threads: Threads that read from the shards.

    Raises:
        UserError: The store is unfinished, damaged or of another version.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 4):
        self.path = Path(path)
        self.description = read_description(self.path)
        self.index = open_index(self.path)
        if self.index.format not in FORMATS:
            raise damaged(self.path / "index.bin", f"its format is {self.index.format!r}")
        self.format = FORMATS[self.index.format]
        self.reader = Reader(self.index, self.path, threads=threads)

    def __len__(self) -> int:
        return self.index.num_clips

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the clips and their pixels. Equal for equal files packed with equal options.

        The distribution of packets over shards is no part of it.
        """
        options = {name: value for name, value in self.description["options"].items() if name != "shard_mib"}
        return {"sources": self.description["sources"], **options}

    def decode(self, decoder: Decoder, clip: int, info: ClipInfo, read: Read, frames: Numbers) -> list[Picture]:
        """Decode in software.

        Args:
            decoder: The thread's own.
            clip: Number of the clip, and ``info`` its entry in the index.
            read: Result of reading ``frames`` with ``single_stream=False``.
            frames: (V,) frame numbers in presentation order.

        Returns:
            V pictures, (H, W, 3) uint8 RGB, before the clip's rotation.

        Raises:
            BadPackets: A frame is damaged or missing.
        """
        if self.format.still:
            packets = read.split()
            return [decode_jpeg(info, packets[picture]) for picture in read.pictures]
        try:
            order = self.index.packets(clip).order
        except ValueError as error:  # reading checks the packets of these frames only
            raise BadPackets(str(error)) from None
        return decoder.decode(info, read, order[frames])


def frames(store: Store | str | os.PathLike[str], clip: int, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Picture:
    """Decode frames of one clip exactly. Packets between close frames are decoded once.

    Args:
        store: An opened store or its folder.
        clip: Number of the clip.
        numbers: Frame numbers in presentation order, in any order. Repeats are allowed.

    Returns:
        (n, H, W, 3) uint8 RGB, upright, in the order of ``numbers``.

    Raises:
        IndexError: No such clip or frame.
        OSError: Data is damaged or cannot be read.
    """
    store = store if isinstance(store, Store) else Store(store)
    info, decoder = store.index.clip(clip), Decoder()
    wanted, places = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
    pictures: list[Picture] = []
    for chunk in np.split(wanted, range(DECODE_CHUNK, len(wanted), DECODE_CHUNK)):
        if not len(chunk):
            continue
        (read,) = store.reader.read([clip], chunk[None], single_stream=False)
        if read.code != "ok":
            raise OSError(f"{store.path}: {read.error}")
        try:
            pictures += store.decode(decoder, clip, info, read, chunk)
        except BadPackets as error:
            raise OSError(f"{store.path}: clip {clip}: {error}") from None
    upright = [np.rot90(picture, -info.rotation // 90) for picture in pictures]
    height, width = (info.width, info.height) if info.rotation % 180 else (info.height, info.width)
    return np.stack([upright[place] for place in places]) if upright else np.empty((0, height, width, 3), np.uint8)
