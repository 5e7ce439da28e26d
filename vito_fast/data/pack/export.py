"""``vito-fast store export``: the clips of a store as video files, without encoding, and a CSV that lists them."""

import csv
import os
from io import BytesIO
from pathlib import Path

import av
import numpy as np

from vito_fast.data.pack.edit import new_store
from vito_fast.data.store.index import DISCARD, NO_PICTURE
from vito_fast.data.store.labels import NO_LABEL
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

COLUMNS = ("path", "start", "end", "label", "id", "group", "origin", "origin_start")
FOLDER = 1000
"""Clips in a folder."""
NOT_MP4 = frozenset(["vp8"])
"""Codecs that MP4 has no place for. Their clips are Matroska files."""


def export(store: str | os.PathLike[str], dst: str | os.PathLike[str]) -> int:
    """Write each clip of a store as an MP4, with the packets that the store has.

    JPEGs become Motion JPEG. Times begin at 0. ``clips.csv`` in ``dst`` lists the files as a clip list of
    :func:`read_clip_list`, with label (its name where it has one), id and group, and the clip's ``origin``: source and
    seconds there.

    Args:
        store: The store.
        dst: Folder of the files. It must not exist, and does not until all files are written.

    Returns:
        The number of clips.

    Raises:
        UserError: The store cannot be read, a clip is damaged or of a codec that cannot be written, or ``dst`` exists.
    """
    opened = Store(store)
    labels, numbers = opened.labels(), np.arange(len(opened))
    with new_store(Path(dst)) as folder, open(folder / "clips.csv", "w", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for clip in range(len(opened)):
            info = opened.index.clip(clip)
            name = f"{clip // FOLDER:04d}/{clip:07d}.{'mkv' if info.codec in NOT_MP4 else 'mp4'}"
            (folder / name).parent.mkdir(exist_ok=True)
            start, end = _write(opened, clip, folder / name)
            row = ["", "", ""]
            if labels is not None:
                label, one = int(labels.label[clip]), numbers[clip : clip + 1]
                text = "" if label == NO_LABEL else labels.classes.get(label, str(label))
                row = [text, *labels.ids(one), *labels.groups(one)]
            table.writerow([name, start, end, *row, info.source, round(info.start, 6)])
    return len(opened)


def _write(store: Store, clip: int, path: Path) -> tuple[str, str]:
    """Write one clip. Returns the ``start`` and ``end`` of exactly its frames for a clip list, as texts."""
    info, packets = store.index.clip(clip), store.index.packets(clip)
    (read,) = store.reader.read([clip], np.arange(info.num_frames)[None], miniclip=True)
    if read.code != "ok":
        raise UserError(f"clip {clip} of {store.name} cannot be exported: {read.error}")
    pts, flags = packets.pts[read.packets], packets.flags[read.packets]
    zero = pts[flags & (DISCARD | NO_PICTURE) == 0].min()
    pts, length = pts - zero, round(info.end / info.time_base) - zero
    order = np.argsort(pts, kind="stable")
    dts = pts[order] - (pts[order] - pts).max()
    durations = np.empty_like(pts)
    durations[order] = np.diff(pts[order], append=max(length, pts.max() + 1))
    with av.open(BytesIO(read.data.tobytes()), "r", format="matroska") as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.time_base = info.time_base
        if info.rotation or info.mirror:
            stream.set_display_rotation(*_rotation(info.rotation, info.mirror))
        demuxed = (packet for packet in source.demux(video=0) if packet.size)
        for packet, *times in zip(demuxed, pts.tolist(), dts.tolist(), durations.tolist(), strict=True):
            packet.stream, packet.time_base = stream, info.time_base
            packet.pts, packet.dts, packet.duration = times
            target.mux_one(packet)
    shown = pts[flags & NO_PICTURE == 0]
    lead = float(-shown.min() * info.time_base) if path.suffix == ".mkv" else 0.0  # an MP4 hides frames before 0
    more = shown.max() >= length
    return f"{lead:g}", f"{lead + float(length * info.time_base):.6f}" if more else ""


def _rotation(rotation: int, mirror: bool) -> tuple[float, bool]:
    """Degrees counterclockwise, and whether the frame is mirrored after that."""
    return (rotation if mirror else -rotation) % 360, mirror
