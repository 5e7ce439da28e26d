"""The description of a store: its format, the options it was packed with, and ``store.json``, which records both.

Imports neither the compiled extension nor a decoder.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vito_fast.errors import UserError

VERSION = 1
"""Version of the store's layout. Readers refuse any other."""


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
    gpu_decoder: str = "NVDEC"

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
)
COPY = StoreFormat(name="copy", summary="packets of the source, not re-encoded", codec=None, still=False)

NVDEC_CODECS = frozenset({"h264", "hevc", "vp9"})
"""FFmpeg's names of the codecs that every GPU since Turing decodes in hardware, at 8 bits per sample."""

FORMATS: dict[str, StoreFormat] = {format.name: format for format in (JPEG, H264, COPY)}
assert tuple(FORMATS) == get_args(FormatName)


@dataclass(frozen=True)
class PackOptions:
    """Options that decide the clips of a store. Equal options and files give equal clips.

    Raises:
        ValueError: A value is out of range. The message names option, value and range.
    """

    format: str = JPEG.name
    """Name of a store format (a key of ``FORMATS``)."""
    short_side: int = 256
    """Short side of a frame in pixels. Smaller videos keep their size."""
    quality: int = 90
    """JPEG quality, 1 to 100 (jpeg)."""
    crf: int = 20
    """Constant rate factor, 0 to 51, lower is better (h264)."""
    gop: int = 8
    """Frames from key to key (h264)."""
    encoder: str = H264.encoders[0]
    """FFmpeg's encoder (h264)."""
    clip_length: float = 10.0
    """Seconds after which a shot is split."""
    min_length: float = 1.0
    """Seconds. Shorter shots are left out."""
    shot_cuts: bool = True
    """Whether clips end at shot changes."""
    keep_still: bool = False
    """Whether to keep clips in which nothing moves."""
    strict: bool = False
    """Whether any damage rejects the whole file. Otherwise its good clips are kept."""
    hdr: str = "tonemap"
    """What becomes of PQ and HLG: ``tonemap`` to BT.709, or ``reject``."""
    deinterlace: bool = False
    """Whether to deinterlace frames that are flagged as interlaced (jpeg and h264)."""
    shard_mib: int = 256
    """Size in MiB after which a new shard begins."""

    def __post_init__(self) -> None:
        rules = {
            "format": (self.format in FORMATS, " or ".join(FORMATS)),
            "short_side": (16 <= self.short_side <= 4096, "16 to 4096"),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "crf": (0 <= self.crf <= 51, "0 to 51"),
            "gop": (1 <= self.gop <= 1000, "1 to 1000"),
            "encoder": (self.encoder in H264.encoders, " or ".join(H264.encoders)),
            "clip_length": (0 < self.clip_length < float("inf"), "above 0"),
            "min_length": (0 <= self.min_length <= self.clip_length, "from 0 to clip_length"),
            "hdr": (self.hdr in ("tonemap", "reject"), "tonemap or reject"),
            "deinterlace": (not self.deinterlace or self.format in (JPEG.name, H264.name), "False in a copy store"),
            "shard_mib": (1 <= self.shard_mib <= 1 << 20, "1 to 1048576"),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {rule}")

    @property
    def store_format(self) -> StoreFormat:
        return FORMATS[self.format]


@dataclass(frozen=True)
class Limits:
    """Limits on one source file. A file beyond any of these is rejected, with the limit as the reason.

    Raises:
        ValueError: A limit is not positive.
    """

    seconds: float = 3600.0
    """Wall time."""
    frames: int = 1_000_000
    pixels: int = 1 << 26
    """Of one frame; the default is 8192 x 8192."""
    memory_mib: int = 8192
    """Address space of the process beyond its own at the start."""

    def __post_init__(self) -> None:
        for name in ("seconds", "frames", "pixels", "memory_mib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")


DUPLICATE = "same content as another file"
"""The reason, up to its colon, of a file that is packed under another name."""


@dataclass
class Report:
    """Result of packing. Also the ``report`` of ``store.json``."""

    clips: int = 0
    videos: int = 0
    frames: int = 0
    hours: float = 0.0
    bytes: int = 0
    frame_rates: dict[str, int] = field(default_factory=dict)
    """Videos by frames per second."""
    short_shots: int = 0
    """Shots left out because they are shorter than ``min_length``."""
    still_clips: int = 0
    """Clips left out because nothing moves in them."""
    listed: bool = False
    """Whether a clip list was packed. Its rows are then counted in place of files."""
    found: int = 0
    """Files and unreadable folders under the source: those packed, rejected and skipped."""
    packed: int = 0
    """Files with at least one clip."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Files by reason, up to its first colon. ``quarantine.jsonl`` has the full reasons."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files that are no videos by their suffix, and unreadable folders, by reason."""
    salvaged: int = 0
    """Packed files of which a part is damaged and left out."""
    lost_frames: int = 0
    """Frames of these parts."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Packed files by what is out of the ordinary about them: see :func:`picture.kinds`."""
    traits: dict[str, int] = field(default_factory=dict)
    """Packed files by color, shape of a pixel, scan and orientation, the 100 most frequent: see
    :func:`picture.traits`."""
    packets_per_frame: float = 0.0
    """Packets decoded per frame used (d/u), as planned for pairs within 2.56 s."""
    complete: bool = True
    """False until all machines have packed their share. The store then has no index yet."""

    def lines(self) -> list[str]:
        """The report as text, one line each. Empty for an incomplete store."""
        if not self.complete:
            return []
        rates = ", ".join(f"{rate} fps: {count}" for rate, count in self.frame_rates.items()) or "not known"
        result = [
            f"{self.clips} clips of {self.videos} videos, {self.hours:.2f} hours, "
            f"{self.frames} frames, {self.bytes / 1e6:.1f} MB",
            f"frame rates: {rates}; packets decoded per frame used: {self.packets_per_frame:.2f}",
        ]
        rejected, skipped = sum(self.rejected.values()), sum(self.skipped.values())
        if self.found:
            what = "rows of the clip list" if self.listed else "files found"
            result.append(f"{self.found} {what}: {self.packed} packed, {rejected} rejected, {skipped} skipped")
        if self.kinds:
            result.append("among those packed: " + ", ".join(f"{kind}: {n}" for kind, n in self.kinds.items()))
        if self.salvaged:
            result.append(f"salvaged: {self.salvaged} damaged files, without {self.lost_frames} frames")
        if self.short_shots:
            result.append(f"left out: {self.short_shots} shots shorter than the shortest clip")
        if self.still_clips:
            result.append(f"left out: {self.still_clips} clips in which nothing moves")
        result += [f"rejected {count}: {reason}" for reason, count in self.rejected.items()]
        result += [f"skipped {count}: {reason}" for reason, count in self.skipped.items()]
        return result

    def rejected_share(self) -> float:
        """Share of rejected files among all videos. Copies of other files do not count."""
        rejected = sum(count for reason, count in self.rejected.items() if reason != DUPLICATE)
        return rejected / max(1, rejected + self.packed)


def damaged(path: Path | str, reason: str) -> UserError:
    """The error for a file of a store that is not as packing left it. The index raises the same for itself."""
    return UserError(f"{path} is damaged: {reason}; delete the store and pack again")


def read_description(store: Path) -> dict[str, Any]:
    """Read and check ``store.json``.

    Args:
        store: Folder of a finished store.

    Returns:
        ``version``, ``options`` (fields of :class:`PackOptions`), ``sources`` (fingerprint of the source files) and
        ``report`` (fields of :class:`Report`).

    Raises:
        UserError: The store is unfinished, damaged or of another version.
    """
    path = store / "store.json"
    if not (store / "index.bin").exists():
        unfinished = (store / ".pack").exists()
        raise UserError(f"{store} is no {'finished ' if unfinished else ''}store: run `vito-fast pack SRC {store}`")
    values = read_json(path)
    version = values.get("version")
    if type(version) is not int:
        raise damaged(path, "it has no version")
    if version != VERSION:
        raise UserError(
            f"{store} is a store of version {version}, this program reads version {VERSION}: "
            "delete the store and pack again"
        )
    if not isinstance(values.get("sources"), str):
        raise damaged(path, "it has no sources")
    return {
        **values,
        "options": asdict(parse_options(path, values.get("options"))),
        "report": asdict(_parse_report(path, values.get("report"))),
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file holds none."""
    try:
        values = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise damaged(path, "it is missing or holds no JSON object")
    return values


def parse_options(path: Path, values: Any) -> PackOptions:
    """The options read from ``path``. Raises UserError for unknown names and values out of range."""
    try:
        return PackOptions(**values)
    except (TypeError, ValueError):
        raise damaged(path, "its options make no sense") from None


def _parse_report(path: Path, values: Any) -> Report:
    try:
        report = Report(**values)
    except TypeError:
        raise damaged(path, "its report makes no sense") from None
    for name, example in asdict(Report()).items():
        value = getattr(report, name)
        counts = value.values() if isinstance(value, dict) else []
        types = (int, float) if isinstance(example, float) else (type(example),)
        if type(value) not in types or any(type(count) is not int for count in counts):
            raise damaged(path, f"its report's {name} makes no sense")
    return report
