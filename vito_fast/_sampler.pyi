from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

API: int
PARAMS: tuple[str, ...]

class Index:
    def __init__(self, path: str | bytes) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def num_clips(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def num_packets(self) -> int: ...
    @property
    def shards(self) -> tuple[tuple[str, int], ...]: ...
    def clip(self, clip: int, /) -> dict[str, Any]: ...
    def times(self, clip: int, /) -> npt.NDArray[np.float64]: ...
    def packets(self, clip: int, /) -> tuple[npt.NDArray[Any], ...]: ...

class IndexWriter:
    def __init__(self, path: str | bytes, format: str, shards: Sequence[tuple[str, int]]) -> None: ...
    def add(
        self,
        *,
        video: int,
        source: bytes,
        codec: str,
        extradata: bytes,
        width: int,
        height: int,
        rotation: int,
        shard: int,
        time_base: tuple[int, int],
        end: int,
        pts: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        checksums: npt.NDArray[np.uint32],
        flags: npt.NDArray[np.uint8],
    ) -> None: ...
    def finish(self) -> int: ...

class Sampler:
    num_clips: int
    def __init__(
        self, index: Index, config: Mapping[str, object], seed: int, chosen: npt.NDArray[np.int64]
    ) -> None: ...
    def sample(
        self, numbers: npt.NDArray[np.int64], attempts: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[Any], ...]: ...
    def clips(self, numbers: npt.NDArray[np.int64], attempts: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]: ...

def checksum(data: object) -> int: ...
def philox(key: int, counter: Sequence[int]) -> list[int]: ...
def shuffled(size: int, seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...
def packet_flags(codec: str, extradata: object, packet: object) -> int | None: ...
def resize_cubic(
    picture: npt.NDArray[np.uint8],
    window: tuple[int, int, int, int],
    vertically: bool,
    horizontally: bool,
    out: npt.NDArray[np.uint8],
) -> None: ...
def plan_packets(
    index: Index, clip: int, frames: npt.NDArray[np.int64], single_stream: bool
) -> tuple[npt.NDArray[Any], ...]: ...

class Reader:
    def __init__(self, index: Index, directory: str | bytes, threads: int) -> None: ...
    def read(
        self, clips: npt.NDArray[np.int64], frames: npt.NDArray[np.int64], miniclip: bool, single_stream: bool
    ) -> list[tuple[Any, ...]]: ...
