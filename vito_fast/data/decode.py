"""Software decoding of planned packets: codec contexts fed raw packets, no container opened or probed.

Every packet goes in with its own number as pts, and frames are known by the number that comes out with them: whatever
the order in which a decoder gives its frames, the frame delivered is the frame asked for.
"""

from collections import OrderedDict
from collections.abc import Sequence
from io import BytesIO

import av
import numpy as np
from PIL import Image

from vito_fast.data.index import ClipInfo, Read
from vito_fast.data.media import rgb

DECODERS = {"av1": "libdav1d"}
"""Where FFmpeg's decoder of a codec does not bear the codec's name (its own ``av1`` works only with hardware)."""


class BadPackets(Exception):
    """The packets do not give the frames they should; the message is the reason."""


class Decoder:
    """Decodes samples one after another; keeps a few opened codec contexts. Use one per thread."""

    CONTEXTS = 8

    def __init__(self) -> None:
        self._contexts: OrderedDict[tuple[str, int, int, bytes], av.VideoCodecContext] = OrderedDict()

    def decode(self, clip: ClipInfo, read: Read, wanted: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Frames of the packets ``wanted`` (``index.packets(clip).order[frames]``): (H, W, 3) uint8 RGB, not turned.

        ``read`` must be planned for them with ``single_stream=False``. Raises BadPackets if a frame does not come out
        whole.
        """
        if clip.codec == "mjpeg":
            return [_jpeg(read.split()[picture]) for picture in read.pictures]
        found = self._decode(clip, read, set(map(int, wanted)))
        return [found[int(number)] for number in wanted]

    def _decode(self, clip: ClipInfo, read: Read, wanted: set[int]) -> dict[int, np.ndarray]:
        context, payloads = self._context(clip), read.split()
        found: dict[int, np.ndarray] = {}
        try:
            for first, end in read.runs:
                for row in [*range(first, end), None]:
                    packet = None
                    if row is not None:
                        packet = av.Packet(payloads[row])
                        packet.pts = packet.dts = int(read.packets[row])
                    for frame in context.decode(packet):
                        if frame.pts in wanted and frame.pts not in found:
                            if frame.is_corrupt:
                                raise BadPackets(f"packet {frame.pts} decodes to a damaged frame")
                            found[frame.pts] = rgb(frame, turn=False)
                context.flush_buffers()
        except av.FFmpegError as error:
            self._contexts.clear()
            raise BadPackets(f"decoder {context.name}: {error.strerror}") from None
        if missing := wanted - found.keys():
            raise BadPackets(f"packet {min(missing)} decodes to no frame")
        return found

    def _context(self, clip: ClipInfo) -> av.VideoCodecContext:
        key = (clip.codec, clip.width, clip.height, clip.extradata)
        context = self._contexts.pop(key, None)
        if context is None:
            context = av.CodecContext.create(DECODERS.get(clip.codec, clip.codec), "r")
            context.thread_count = 1
            context.width, context.height = clip.width, clip.height
            if clip.extradata:
                context.extradata = clip.extradata
        self._contexts[key] = context
        if len(self._contexts) > self.CONTEXTS:
            self._contexts.popitem(last=False)
        return context


def _jpeg(data: np.ndarray) -> np.ndarray:
    try:
        return np.asarray(Image.open(BytesIO(data.tobytes())).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise BadPackets(f"no valid JPEG: {error}") from None
