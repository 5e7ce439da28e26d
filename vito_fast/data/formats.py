"""The store formats: everything that depends on the choice of one. Imports nothing of this package."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

FormatName = Literal["jpeg", "h264", "copy"]
"""Names of the store formats, as in ``vito-fast pack --format``."""

Route = Literal["image", "frames", "video"]
"""Input of the loader's DALI pipeline: JPEG files, frames decoded in software, or small video files for NVDEC."""


@dataclass(frozen=True)
class StoreFormat:
    """How the clips of a store are coded. Packing, reading, the loader and ``plan`` ask this object, never its name."""

    name: FormatName
    summary: str
    """For the command line's help."""
    codec: str | None
    """FFmpeg's name of the codec that packing encodes to. None: packets are copied from the source."""
    still: bool
    """Whether each packet is a JPEG file, decoded alone. Otherwise packets belong to a video stream."""
    encoders: tuple[str, ...] = ()
    """FFmpeg's encoders to choose from."""
    size_multiple: int = 1
    """Frames are cropped to multiples of this many pixels."""
    gpu_decoder: str = "NVDEC"

    def stored_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of a frame of ``height`` x ``width`` once stored."""
        step = self.size_multiple
        height, width = (side // step * step if side >= 2 * step else side for side in (height, width))
        return height, width

    def route(self, codec: str, hardware_codecs: Collection[str]) -> Route:
        """The pipeline input for a clip of ``codec`` on a device that decodes ``hardware_codecs``."""
        if self.still:
            return "image"
        return "video" if codec in hardware_codecs else "frames"


JPEG = StoreFormat(
    name="jpeg",
    summary="every frame a JPEG, any frame in one read",
    codec="mjpeg",
    still=True,
    gpu_decoder="nvJPEG",
)
H264 = StoreFormat(
    name="h264",
    summary="short groups of pictures",
    codec="h264",
    still=False,
    encoders=("libx264", "h264_nvenc"),
    size_multiple=32,  # NVDEC restarts its decoder at each new frame size, so few sizes should occur
)
COPY = StoreFormat(name="copy", summary="packets of the source, not re-encoded", codec=None, still=False)

NVDEC_CODECS = frozenset({"h264", "hevc", "vp9"})
"""FFmpeg's names of the codecs that every GPU since Turing decodes in hardware, at 8 bits per sample."""

FORMATS: dict[str, StoreFormat] = {format.name: format for format in (JPEG, H264, COPY)}
assert tuple(FORMATS) == get_args(FormatName)
