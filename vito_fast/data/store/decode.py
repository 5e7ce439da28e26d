"""Software decoding of planned packets: codec contexts get raw packets, and no container is opened or probed.

Each packet enters the decoder with its number as pts, and each frame is identified by the number that comes out. So the
delivered frame is the requested one, in any order of the decoder's output.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import TypeVar

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

from vito_fast.data.store.index import ClipInfo, Read
from vito_fast.data.store.media import bare_packet, decoder_options

T = TypeVar("T")
Picture = npt.NDArray[np.uint8]

DECODERS = {"av1": "libdav1d"}
"""FFmpeg's software decoder of a codec, if its name differs from the codec's (``av1`` needs hardware)."""


class BadPackets(Exception):
    """The packets do not decode to the expected frames. The message is the reason."""


class Decoder:
    """Decodes samples one after another and caches a few codec contexts. Use one per thread."""

    CONTEXTS = 8

    def __init__(self) -> None:
        self._converter = VideoReformatter()
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
        found = self.each(clip, read, set(numbers), self._rgb)
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

    def _rgb(self, frame: VideoFrame) -> Picture:
        """``media.rgb`` without rotation, by one converter for all frames and without threads."""
        return np.asarray(self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), np.uint8)

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
