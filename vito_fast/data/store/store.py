"""An opened store: its index, its shards, and exactly decoded frames.

Codec contexts get raw packets, and no container is opened or probed. Each packet enters the decoder with its number as
pts, and each frame is identified by the number that comes out. So the delivered frame is the requested one, in any
order of the decoder's output.
"""

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from PIL import Image

from vito_fast.data.store.description import FORMATS, PackOptions, Report, damaged, read_description
from vito_fast.data.store.index import ClipInfo, Index, Read, Reader, checksum, open_index
from vito_fast.data.store.labels import Labels, read_labels
from vito_fast.data.store.media import bare_packet, decoder_options
from vito_fast.data.store.picture import rgb, turned
from vito_fast.data.store.remote import is_remote
from vito_fast.data.store.remote_store import RemoteReader, RemoteStore
from vito_fast.errors import UserError

T = TypeVar("T")
Picture = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int32] | npt.NDArray[np.int64]

DECODE_CHUNK = 64
"""Frames that :func:`frames` reads and decodes together. Bounds its memory."""

DECODERS = {"av1": "libdav1d"}
"""FFmpeg's software decoder of a codec, if its name differs from the codec's (``av1`` needs hardware)."""


class BadPackets(Exception):
    """The packets do not decode to the expected frames. The message is the reason."""


class Decoder:
    """Decodes samples one after another and caches a few codec contexts. Use one per thread."""

    CONTEXTS = 8

    def __init__(self) -> None:
        self._contexts: OrderedDict[tuple[str, int, int, bytes], av.VideoCodecContext] = OrderedDict()

    def decode(self, clip: ClipInfo, read: Read, wanted: Iterable[int]) -> list[Picture]:
        """Decode frames.

        Args:
            clip: Entry of the index.
            read: Packets that were read for these frames with ``single_stream=False``.
            wanted: Packet numbers of the frames, ``index.packets(clip).order[frames]``.

        Returns:
            (H, W, 3) uint8 RGB of each, in order, before the clip's rotation.

        Raises:
            BadPackets: A frame is damaged or missing.
        """
        numbers = [int(number) for number in wanted]
        found = self.each(clip, read, set(numbers), partial(rgb, turn=False))
        return [found[number] for number in numbers]

    def each(self, clip: ClipInfo, read: Read, wanted: set[int], use: Callable[[VideoFrame], T]) -> dict[int, T]:
        """Apply ``use`` to the frame of each packet in ``wanted``. Returns the results by packet number."""
        context, payloads = self._context(clip), read.split()
        found: dict[int, T] = {}
        try:
            for first, end in read.runs:
                for row in [*range(first, end), None]:
                    packet = None
                    if row is not None:
                        packet = bare_packet(payloads[row], int(read.packets[row]))
                        packet.is_keyframe = row == first  # PNG's decoder blends other packets into the previous frame
                    for frame in context.decode(packet):
                        if frame.pts in wanted and frame.pts not in found:
                            if frame.is_corrupt:
                                raise BadPackets(f"packet {frame.pts} decodes to a damaged frame")
                            if (frame.width, frame.height) != (clip.width, clip.height):
                                raise BadPackets(f"packet {frame.pts} decodes to {frame.width} x {frame.height} pixels")
                            found[frame.pts] = use(frame)
                context.flush_buffers()
        except av.FFmpegError as error:
            raise BadPackets(f"decoder {context.name}: {error.strerror}") from None
        finally:
            if wanted - found.keys():  # the state of a failed decoder must not reach the next sample
                self._contexts.clear()
        if missing := wanted - found.keys():
            raise BadPackets(f"packet {min(missing)} decodes to no frame")
        return found

    def _context(self, clip: ClipInfo) -> av.VideoCodecContext:
        key = (clip.codec, clip.width, clip.height, clip.extradata)
        context = self._contexts.pop(key, None)
        if context is None:
            context = open_decoder(clip.codec, clip.width, clip.height, clip.extradata)
        self._contexts[key] = context
        if len(self._contexts) > self.CONTEXTS:
            self._contexts.popitem(last=False)
        return context


def open_decoder(codec: str, width: int, height: int, extradata: bytes) -> av.VideoCodecContext:
    """Open a decoder from the index's entry alone. Raises BadPackets for a codec that FFmpeg cannot decode."""
    try:
        context = av.CodecContext.create(DECODERS.get(codec, codec), "r")
    except (av.FFmpegError, ValueError) as error:
        raise BadPackets(f"no decoder for {codec}: {error}") from None
    assert isinstance(context, av.VideoCodecContext)
    context.thread_count, context.options = 1, decoder_options(codec, bare=True)
    context.width, context.height = width, height
    if extradata:
        context.extradata = extradata
    return context


def decode_jpeg(clip: ClipInfo, data: Picture) -> Picture:
    """Decode a JPEG by libjpeg-turbo, as DALI does on a CPU.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        BadPackets: It is damaged or not of the clip's size.
    """
    try:
        picture = np.asarray(Image.open(BytesIO(data.tobytes()), formats=["JPEG"]).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPackets(f"no whole JPEG: {error}") from None
    if picture.shape != (clip.height, clip.width, 3):
        raise BadPackets(f"a JPEG of {picture.shape[1]} x {picture.shape[0]} pixels")
    return picture


def check_shards(store: Path, index: Index) -> None:
    """Raise UserError if a shard is missing or not of its size."""
    for name, size in index.shards:
        path = store / name
        if not path.exists():
            raise damaged(path, "it is missing")
        if (found := path.stat().st_size) != size:
            raise damaged(path, f"it has {found} bytes, not {size}")


class Store:
    """A store opened for reading. Thread-safe.

    Args:
        path: Folder written by ``vito-fast pack``, or the address of one, as ``s3://bucket/store``. Remote stores are
            read by a cache on this machine, which all processes and stores share.
        threads: Threads that read from the shards.
        check: Whether every shard must be there, of its size.
        cache: Folder of the cache. "" is ``$VITO_FAST_CACHE``, else ``vito-fast`` in the user's cache folder.
        cache_gib: GiB that the cache may take on the disk. 0 is ``$VITO_FAST_CACHE_GIB``, else 50.

    Attributes:
        name: ``path``, for messages.
        path: Folder of the store's small files, in the cache for a remote store.
        remote: Of a remote store, else None.

    Raises:
        UserError: The store is unfinished, damaged or of another version, or cannot be reached.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 4,
        check: bool = True,
        cache: str | os.PathLike[str] = "",
        cache_gib: float = 0.0,
    ):
        self.remote = RemoteStore(path, cache, cache_gib) if is_remote(path) else None
        self.path = self.remote.folder if self.remote else Path(path)
        self.name = self.remote.name if self.remote else str(path)
        with self._named():
            self.description = read_description(self.path)
            self.index = open_index(self.path)
            if self.index.format not in FORMATS:
                raise damaged(self.path / "index.bin", f"its format is {self.index.format!r}")
            self.format = FORMATS[self.index.format]
        self.reader: Reader
        if self.remote:
            self.remote.bind(self.index, check=check)
            self.reader = RemoteReader(self.index, self.remote, threads=threads)
        else:
            if check:
                check_shards(self.path, self.index)
            self.reader = Reader(self.index, self.path, threads=threads)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the store by its address in messages."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error).replace(str(self.path), self.name)) from None

    def labels(self) -> Labels | None:
        """Classes and ids of the clips, None if the store has none. Raises UserError as :func:`.labels.read_labels`."""
        with self._named():
            return read_labels(self.path, len(self))

    def __len__(self) -> int:
        return self.index.num_clips

    @property
    def report(self) -> Report:
        """The report of packing."""
        return Report(**self.description["report"])

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the clips and their pixels. Equal for equal files packed with equal options.

        The distribution of packets over shards is no part of it.
        """
        options = {name: value for name, value in self.description["options"].items() if name != "shard_mib"}
        return {"sources": self.description["sources"], **options}

    @property
    def digest(self) -> str:
        """Hash of ``identity``. An option of its default value counts as one that an older store does not have."""
        defaults = asdict(PackOptions())
        parts = {key: value for key, value in self.identity.items() if key == "format" or value != defaults.get(key)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def packets(self, clip: int) -> list[bytes]:
        """All packets of a clip as packed, in decoding order.

        Raises:
            UserError: One is damaged or cannot be read.
        """
        packets, shard = self.index.packets(clip), self.index.clip(clip).shard
        first, last = int(packets.offsets.min()), int((packets.offsets + packets.sizes).max())
        data, found = self._read(shard, first, last), []
        for offset, size, expected in zip(packets.offsets - first, packets.sizes, packets.checksums, strict=True):
            found.append(data[offset : offset + size])
            if len(found[-1]) != size or checksum(found[-1]) != expected:
                raise UserError(f"clip {clip} of {self.name} is damaged: see `vito-fast inspect-store {self.name}`")
        return found

    def _read(self, shard: int, start: int, end: int) -> bytes:
        if self.remote:
            return self.remote.read(shard, start, end)
        with open(self.path / self.index.shards[shard][0], "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def copy_shard(self, shard: int, target: Path) -> None:
        """Write a shard to ``target``: a link, or a copy from another file system or address."""
        if self.remote:
            return self.remote.download(shard, target)
        source = self.path / self.index.shards[shard][0]
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

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
            raise OSError(f"{store.name}: {read.error}")
        try:
            pictures += store.decode(decoder, clip, info, read, chunk)
        except BadPackets as error:
            raise OSError(f"{store.name}: clip {clip}: {error}") from None
    upright = [turned(picture, info.rotation, info.mirror) for picture in pictures]
    height, width = (info.width, info.height) if info.rotation % 180 else (info.height, info.width)
    return np.stack([upright[place] for place in places]) if upright else np.empty((0, height, width, 3), np.uint8)
