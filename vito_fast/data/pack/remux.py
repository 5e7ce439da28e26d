"""Copying: the packets of a video as they are, with an index from which any frame decodes exactly.

The file is decoded once in order, by a decoder that has all the information of its container. Then each group of
pictures is decoded from bare packets, planned from its key, as training does. Each frame must be identical, bit for
bit. A key that fails is not used. A file that fails without it is rejected.
"""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from vito_fast.data.pack.clips import (
    CLOCK,
    GAP,
    PackedClip,
    PackedFile,
    ShardWriter,
    Span,
    TimeSpan,
    frame_duration,
    too_short,
)
from vito_fast.data.pack.shots import Cut, ShotDetector
from vito_fast.data.store.description import Limits, PackOptions
from vito_fast.data.store.index import (
    DISCARD,
    KEY,
    NO_PICTURE,
    OPEN,
    ClipRecord,
    Index,
    Reader,
    checksum,
    packet_flags,
    write_index,
)
from vito_fast.data.store.media import (
    Aspects,
    BadVideo,
    Gate,
    Member,
    bare_packet,
    claimed_rate,
    decoder_options,
    demuxed,
    missing_end,
    opened,
    presentation_times,
)
from vito_fast.data.store.picture import HDR, kinds, orientation, rgb, traits
from vito_fast.data.store.store import BadPackets, Decoder


@dataclass
class _Stream:
    """One source: its packets in decoding order and the frames decoded from them."""

    codec: str
    extradata: bytes
    time_base: Fraction
    rate: Fraction
    salvage: bool
    pts: list[int | None] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    """Packet number of each frame, in the decoder's output order."""
    frame_sums: dict[int, int] = field(default_factory=dict)
    """Checksum of the frame of each packet."""
    scenes: dict[int, tuple[int | None, int, int, int, bool]] = field(default_factory=dict)
    """Of the frame of each packet: its run of undisturbed packets, size, rotation and mirror. A clip has one scene."""
    moved: dict[int, int] = field(default_factory=dict)
    """Of the frame of each packet: the last frame that differs visibly from those before it."""
    shots: set[int] = field(default_factory=set)
    """Packet numbers of the frames that begin a shot."""


class Remuxer:
    """Copies the packets of one source to a shard and indexes them as clips."""

    def __init__(
        self,
        options: PackOptions,
        shard: ShardWriter,
        limits: Limits = Limits(),
        spans: Sequence[Span | TimeSpan] | None = None,
    ):
        self.options, self.shard, self.limits, self.spans = options, shard, limits, spans
        self.result = PackedFile()

    def run(self, path: Path | Member, heartbeat: Callable[[], None] = lambda: None) -> PackedFile:
        """Pack one file.

        Args:
            path: The source.
            heartbeat: Called after each frame.

        Raises:
            BadVideo: The file cannot be packed. The caller then rewinds the shard.
        """
        start = self.shard.size
        stream = self._copy(path, heartbeat)
        self._cut(stream)
        self.shard.flush()
        self._make_exact(stream, heartbeat)
        if not self.result.clips:
            self.shard.rewind(start)
        return self.result

    def _copy(self, path: Path | Member, heartbeat: Callable[[], None]) -> _Stream:
        matrix = _display_matrix(path)
        with opened(path) as (container, video):
            context = video.codec_context
            codec, extradata = context.codec.canonical_name, context.extradata or b""
            time_base, salvage = video.time_base or Fraction(1, 90000), not self.options.strict
            stream = _Stream(codec, extradata, time_base, claimed_rate(video), salvage)
            context.thread_count, context.options = 1, decoder_options(codec)
            gate, aspects = Gate(context, self.limits, salvage=salvage), Aspects(video)
            if reason := missing_end(container, video):
                gate.damage(reason)
            detector, cuts, found = ShotDetector(), list[Cut](), set[str]()
            for number, frame, run in gate.frames(demuxed(container, video), partial(self._take, stream)):
                if self.options.hdr == "reject" and frame.color_trc in HDR:
                    raise BadVideo(f"HDR: its transfer function is {HDR[frame.color_trc]}")
                if run is None:
                    stream.flags[number] |= DISCARD
                    self.result.lost += 1
                cuts += detector.push(frame)
                found |= kinds(frame, aspects.now())
                self.result.traits = self.result.traits or traits(frame, aspects.now(), *matrix)
                stream.outputs.append(number)
                stream.frame_sums[number] = frame_checksum(frame)
                stream.scenes[number] = (run, frame.width, frame.height, *matrix)
                stream.moved[number] = detector.moved
                heartbeat()
        if self.options.shot_cuts:
            stream.shots = {stream.outputs[cut.frame] for cut in cuts + detector.finish()}
        rotation, mirror = matrix
        found |= {name for name, true in (("rotated", rotation), ("mirrored", mirror)) if true}
        expected = sum(not flags & NO_PICTURE for flags in stream.flags)
        if not stream.outputs or len(stream.outputs) == self.result.lost:
            raise BadVideo(gate.reasons[0] if gate.reasons else "holds no frame")
        if len(stream.outputs) < 0.9 * expected:
            gate.damage(f"only {len(stream.outputs)} of {expected} frames can be decoded")
        self.result.lost += max(0, expected - len(stream.outputs))
        self.result.kinds, self.result.damage = sorted(found), (gate.reasons or [""])[0]
        return stream

    def _take(self, stream: _Stream, packet: av.Packet) -> av.Packet:
        """Record and copy one packet. Returns it without times and edit list, which its decoder must not apply."""
        payload = bytes(packet)
        flags = packet_flags(stream.codec, stream.extradata, payload)
        if flags is None:
            flags = KEY | OPEN if packet.is_keyframe else 0
        stream.flags.append(flags | (DISCARD if packet.is_discard else 0))
        stream.pts.append(packet.pts if packet.pts is not None else packet.dts)
        stream.offsets.append(self.shard.append(payload))
        stream.sizes.append(len(payload))
        stream.checksums.append(checksum(payload))
        bare = bare_packet(payload, len(stream.pts) - 1)
        bare.is_keyframe = packet.is_keyframe
        for extra in packet.iter_sidedata():
            bare.set_sidedata(extra)
        return bare

    def _cut(self, stream: _Stream) -> None:
        """Make clips of the shown frames, split at shots, at gaps and at the clip length."""
        step = max(1, round(1 / (stream.rate * stream.time_base)))
        shown = [place for place, number in enumerate(stream.outputs) if not stream.flags[number] & DISCARD]
        if not shown:
            raise BadVideo("its edit list shows no frame")
        restart = round(GAP / stream.time_base) if stream.salvage else None
        ticks = _ticks([stream.pts[number] for number in stream.outputs], shown, step, restart)
        tick = float(stream.time_base)
        self.result.rate = 1 / frame_duration(ticks[shown] * tick, stream.rate)
        if self.spans is not None:
            self._cut_spans(stream, ticks, np.array(shown), self.spans)
            return
        length = self.options.clip_length / stream.time_base
        first = 0
        for place in range(1, len(shown) + 1):
            end: int | None = None  # when the frame after comes
            if place < len(shown):
                here = int(ticks[shown[place]])
                gap = (here - ticks[shown[place - 1]]) * stream.time_base > GAP
                if not gap:
                    end = here
                    long = here - ticks[shown[first]] >= length
                    number, begin = stream.outputs[shown[place]], stream.outputs[shown[first]]
                    same = stream.scenes[number] == stream.scenes[begin]
                    if number not in stream.shots and not long and same:
                        continue
            times = ticks[shown[first:place]]
            if end is None:
                end = int(times[-1]) + round(frame_duration(times * tick, stream.rate) / tick)
            if too_short(times[0] * tick, end * tick, self.options.min_length):
                self.result.too_short += 1
            elif not self.options.keep_still and stream.moved[stream.outputs[shown[place - 1]]] <= shown[first]:
                self.result.still += 1
            elif (clip := self._clip(stream, ticks, shown[first:place], end)) is not None:
                self.result.clips.append(clip)
            first = place

    def _cut_spans(
        self, stream: _Stream, ticks: np.ndarray, shown: np.ndarray, spans: Sequence[Span | TimeSpan]
    ) -> None:
        """Make the clips of a clip list."""
        tick = float(stream.time_base)
        seconds = (ticks[shown] - ticks[shown[0]]) * tick
        for row, span in enumerate(spans):
            assert isinstance(span, TimeSpan)
            first, last = np.searchsorted(seconds, [span.start - CLOCK / 2, span.end - CLOCK / 2]).tolist()
            places = shown[first:last].tolist()
            if not places:
                self.result.refused.append((row, span.missing(len(shown), seconds[-1])))
                continue
            if len({stream.scenes[stream.outputs[place]] for place in places}) > 1:
                self.result.refused.append((row, "damage or another frame size in the clip"))
                continue
            end = int(ticks[places[-1]]) + round(frame_duration(ticks[places] * tick, stream.rate) / tick)
            if last < len(shown) and seconds[last] - seconds[last - 1] <= GAP:
                end = int(ticks[shown[last]])
            if (clip := self._clip(stream, ticks, places, end)) is None:
                self.result.refused.append((row, self.result.damage))
                continue
            self.result.clips.append(clip)
            self.result.rows.append(row)

    def _clip(self, stream: _Stream, ticks: np.ndarray, places: list[int], end: int) -> PackedClip | None:
        """The clip of the frames at ``places`` of the output order: all packets from the last key before them.

        None if there is no such key and the file is salvaged.
        """
        flags = np.array(stream.flags, np.uint8)
        pts = np.full(len(flags), ticks[0])
        pts[stream.outputs] = ticks
        hidden = np.ones(len(flags), bool)
        hidden[stream.outputs] = False
        flags[hidden] |= NO_PICTURE
        wanted = np.array([stream.outputs[place] for place in places])
        keys = np.flatnonzero(flags & KEY > 0)
        keys = keys[(keys <= wanted.min()) & (pts[keys] <= pts[wanted].min())]
        if not len(keys):
            self._lose(stream, len(places), "begins with frames that no key comes before")
            return None
        part = slice(int(keys[-1]), int(wanted.max()) + 1)
        lead = np.ones(len(flags), bool)
        lead[wanted] = False
        flags[lead & ~hidden] |= DISCARD
        _, width, height, rotation, mirror = stream.scenes[int(wanted[0])]
        return PackedClip(
            codec=stream.codec, width=width, height=height, rotation=rotation, mirror=mirror,
            shard=self.shard.number, time_base=stream.time_base, end=max(end, int(pts[wanted].max()) + 1),
            extradata=stream.extradata, pts=pts[part], offsets=np.array(stream.offsets[part], np.int64),
            sizes=np.array(stream.sizes[part], np.int64), checksums=np.array(stream.checksums[part], np.uint32),
            flags=flags[part],
        )  # fmt: skip

    def _make_exact(self, stream: _Stream, heartbeat: Callable[[], None]) -> None:
        """Clear the flags of keys from which a frame decodes differently. A clip that this does not help is lost."""
        clips, self.result.clips = self.result.clips, []
        rows, self.result.rows = self.result.rows, []
        for place, clip in enumerate(clips):
            bad = self._inexact_keys(stream, clip, heartbeat)
            if bad:  # its first key stays: without it the clip has no start
                clip.flags[[key for key in bad if key]] &= np.uint8(0xFF & ~(KEY | OPEN))
                if self._inexact_keys(stream, clip, heartbeat):
                    frames = int(np.count_nonzero(clip.flags & (DISCARD | NO_PICTURE) == 0))
                    reason = "cannot be decoded exactly from its keys alone: pack it into another format"
                    self._lose(stream, frames, reason)
                    if rows:
                        self.result.refused.append((rows[place], reason))
                    continue
            self.result.clips.append(clip)
            self.result.rows += rows[place : place + 1]
        if clips and not self.result.clips:
            raise BadVideo(self.result.damage)

    def _lose(self, stream: _Stream, frames: int, reason: str) -> None:
        """Leave out a clip. Raises BadVideo if the file is not to be salvaged."""
        if not stream.salvage:
            raise BadVideo(reason)
        self.result.lost += frames
        self.result.damage = self.result.damage or reason

    def _inexact_keys(self, stream: _Stream, clip: PackedClip, heartbeat: Callable[[], None]) -> list[int]:
        base = stream.offsets.index(int(clip.offsets[0]))
        bad = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index.bin"
            record = ClipRecord(video=0, source="", **{**vars(clip), "shard": 0})
            write_index(path, [record], format=self.options.format, shards=[(self.shard.path.name, self.shard.size)])
            index = Index(path)
            reader, decoder = Reader(index, self.shard.path.parent, threads=1), Decoder()
            order = index.packets(0).order
            keys = np.flatnonzero(clip.flags & KEY > 0)
            groups = np.searchsorted(clip.pts[keys], clip.pts[order], side="right") - 1
            for group in np.unique(groups):
                frames = np.flatnonzero(groups == group)
                (read,) = reader.read(np.array([0]), frames[None], single_stream=False)
                try:
                    if read.code != "ok":
                        raise BadVideo(f"cannot be read back: {read.error}")
                    wanted = set(order[frames].tolist())
                    sums = decoder.each(index.clip(0), read, wanted, frame_checksum)
                    if any(sums[number] != stream.frame_sums[base + number] for number in wanted):
                        bad.append(int(keys[group]))
                except BadPackets:
                    bad.append(int(keys[group]))
                heartbeat()
        return bad


def _ticks(pts: list[int | None], shown: list[int], step: int, restart: int | None = None) -> np.ndarray:
    """Times of all frames in output order, strictly increasing. Hidden frames do not move shown ones."""
    ticks = presentation_times(pts, step, restart)
    own = presentation_times([pts[place] for place in shown], step, restart)
    if not np.array_equal(ticks[shown], own):  # times out of order: squeeze hidden frames in between
        known, squeezed = dict(zip(shown, own.tolist(), strict=True)), [int(own[0]) - len(pts) - 1]
        for place in range(len(pts)):
            squeezed.append(known.get(place, squeezed[-1] + 1))
        if (np.diff(squeezed) > 0).all():
            return np.array(squeezed[1:], np.int64)
    return ticks


def frame_checksum(frame: VideoFrame) -> int:
    """Checksum of a frame's samples without the padding of its lines."""
    try:
        samples = np.ascontiguousarray(frame.to_ndarray()).view(np.uint8)
    except (ValueError, AssertionError):  # a format, or an odd size of one, that PyAV does not lay out as an array
        samples = rgb(frame, turn=False)
    return checksum(samples)


def _display_matrix(path: Path | Member) -> tuple[int, bool]:
    """How the file's frames are turned for display: see :func:`orientation`. Bare packets do not say it."""
    with opened(path) as (container, video):
        for packet in demuxed(container, video):
            with contextlib.suppress(av.FFmpegError):  # damage is found when the packets are copied
                for frame in video.codec_context.decode(packet):
                    return orientation(frame)
    raise BadVideo("holds no frame")
