"""Software decoding of planned packets: codec contexts fed raw packets, no container opened or probed.

Every packet goes in with its own number as pts, and frames are known by the number that comes out with them: whatever
the order in which a decoder gives its frames, the frame delivered is the frame asked for.
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
from vito_fast.data.store.media import bare_packet, strictness

T = TypeVar("T")
Picture = npt.NDArray[np.uint8]

DECODERS = {"av1": "libdav1d"}
"""Where FFmpeg's decoder of a codec does not bear the codec's name (its own ``av1`` works only with hardware)."""


class BadPackets(Exception):
    """The packets do not give the frames they should; the message is the reason."""


class Decoder:
    """Decodes samples one after another; keeps a few opened codec contexts. Use one per thread."""

    CONTEXTS = 8

    def __init__(self) -> None:
        self._converter = VideoReformatter()
        self._contexts: OrderedDict[tuple[str, int, int, bytes], av.VideoCodecContext] = OrderedDict()

    def decode(self, clip: ClipInfo, read: Read, wanted: Iterable[int]) -> list[Picture]:
        """Frames of the packets ``wanted`` (``index.packets(clip).order[frames]``): (H, W, 3) uint8 RGB, not turned.

        ``read`` must be planned for them with ``single_stream=False``. Raises BadPackets if a frame does not come out
        whole.
        """
        numbers = [int(number) for number in wanted]
        found = self.each(clip, read, set(numbers), self._rgb)
        return [found[number] for number in numbers]

    def each(self, clip: ClipInfo, read: Read, wanted: set[int], use: Callable[[VideoFrame], T]) -> dict[int, T]:
        """``use`` of the frame of every packet in ``wanted``, by packet number; otherwise as :meth:`decode`."""
        context, payloads = self._context(clip), read.split()
        found: dict[int, T] = {}
        try:
            for first, end in read.runs:
                for row in [*range(first, end), None]:
                    packet = None
                    if row is not None:
                        packet = bare_packet(payloads[row], int(read.packets[row]))
                        packet.is_keyframe = row == first  # PNG's decoder adds others to the picture before
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
            if wanted - found.keys():  # whatever went wrong must not reach the next sample
                self._contexts.clear()
        if missing := wanted - found.keys():
            raise BadPackets(f"packet {min(missing)} decodes to no frame")
        return found

    def _rgb(self, frame: VideoFrame) -> Picture:
        """As ``media.rgb`` without turning; with one converter for all frames, and no threads of its own."""
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
    """A decoder that knows of the stream what an index knows. Raises BadPackets for a codec FFmpeg cannot decode."""
    try:
        context = av.CodecContext.create(DECODERS.get(codec, codec), "r")
    except (av.FFmpegError, ValueError) as error:
        raise BadPackets(f"no decoder for {codec}: {error}") from None
    assert isinstance(context, av.VideoCodecContext)
    context.thread_count, context.options = 1, strictness(codec)
    if codec == "h264":  # a stream that does not tell how far frames are reordered: assume the most, so none is lost
        context.options = {"strict": "strict"}
    context.width, context.height = width, height
    if extradata:
        context.extradata = extradata
    return context


def decode_jpeg(clip: ClipInfo, data: Picture) -> Picture:
    """(H, W, 3) uint8 RGB, by libjpeg-turbo as DALI's CPU decoder does. Raises BadPackets if it is not a whole JPEG of
    the clip's size."""
    try:
        picture = np.asarray(Image.open(BytesIO(data.tobytes()), formats=["JPEG"]).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPackets(f"no whole JPEG: {error}") from None
    if picture.shape != (clip.height, clip.width, 3):
        raise BadPackets(f"a JPEG of {picture.shape[1]} x {picture.shape[0]} pixels")
    return picture
