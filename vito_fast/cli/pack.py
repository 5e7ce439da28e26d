"""``vito-fast pack``."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vito_fast.cli.overrides import Address, Place
from vito_fast.data.store.description import FORMATS, JPEG, FormatName, Limits
from vito_fast.errors import UserError

FORMAT_HELP = "; ".join(f"{format.name}: {format.summary}" for format in FORMATS.values()) + "."


def pack(
    src: Place,
    dst: Address,
    format: Annotated[FormatName, tyro.conf.arg(help=FORMAT_HELP)] = JPEG.name,
    short_side: int = 256,
    quality: int = 90,
    crf: int = 20,
    gop: int = 8,
    encoder: Literal["auto", "libx264", "h264_nvenc"] = "auto",
    clip_length: float = 10.0,
    min_length: float = 1.0,
    shot_cuts: Annotated[bool, tyro.conf.FlagConversionOff] = True,
    keep_still: bool = False,
    strict: bool = False,
    hdr: Literal["tonemap", "reject"] = "tonemap",
    deinterlace: bool = False,
    max_rejected: float = 0.5,
    shard_mib: int = 256,
    shard: str = "1/1",
    engine: Literal["local", "ray"] = "local",
    clips: Path | None = None,
    processes: int = 0,
    decode_timeout: float = 120.0,
    io_timeout: float = 60.0,
    skip_unreadable: bool = False,
    limits: Limits = Limits(),
) -> int:
    """Turn a folder of videos into a store. Safe to kill and to repeat.

    Args:
        src: A folder of videos and tar archives of them, searched through, or one of either.
        dst: The store to write, a folder or an address. The store is packed here and then uploaded to an address.
        short_side: Short side of a frame in pixels. Smaller videos keep their size.
        quality: JPEG quality, 1 to 100.
        crf: Constant rate factor of h264 stores, 0 to 51, lower is better.
        gop: Frames from key to key of h264 stores.
        encoder: Encoder of h264 stores. auto is h264_nvenc where it works, else libx264.
        clip_length: Seconds after which a shot is split.
        min_length: Seconds. Shorter shots are left out.
        shot_cuts: Whether clips end at shot changes.
        keep_still: Keep clips in which nothing moves.
        strict: Reject a file with any damage. Otherwise its good clips are kept.
        hdr: What becomes of PQ and HLG: tonemap to BT.709, or reject.
        deinterlace: Deinterlace frames that are flagged as interlaced, in jpeg and h264 stores.
        max_rejected: Share of rejected videos above which the exit status is 1. The store is written all the same.
        shard_mib: Size in MiB after which a new shard file begins.
        shard: i/n packs the i-th of n shares of the files, for n machines.
        engine: local (processes of this machine) or ray (the cluster of RAY_ADDRESS, whose nodes see SRC and DST).
        clips: A clip list, CSV or Parquet: its rows are packed in place of shots, with their labels (docs/data.md).
        processes: Worker processes, 0 = one per core. One of them packs a whole file.
        decode_timeout: Seconds without a decoded frame after which a file is rejected.
        io_timeout: Seconds for which a file that a disk or the network fails to deliver is tried again.
        skip_unreadable: Reject a file that still fails, instead of ending without the store.
        limits: Wall time, frames, pixels and memory of one file, after which it is rejected.
    """
    from vito_fast.data.pack import pack as pack_videos
    from vito_fast.data.pack.clip_list import read_clip_list
    from vito_fast.data.pack.on_ray import pack_on_ray

    if not 0 <= max_rejected <= 1:
        raise UserError(f"max_rejected is {max_rejected}, must be within 0 and 1")
    if engine == "ray" and (shard != "1/1" or processes):
        raise UserError("--engine ray shares the files out itself: leave out --shard and --processes")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vito_fast.data").setLevel(logging.INFO)
    options: dict[str, Any] = {
        "format": format, "short_side": short_side, "quality": quality, "crf": crf, "gop": gop, "encoder": encoder,
        "clip_length": clip_length, "min_length": min_length, "shot_cuts": shot_cuts, "keep_still": keep_still,
        "strict": strict, "hdr": hdr, "deinterlace": deinterlace, "shard_mib": shard_mib,
        "decode_timeout": decode_timeout, "io_timeout": io_timeout, "skip_unreadable": skip_unreadable,
        "limits": limits, "clips": read_clip_list(clips) if clips else None,
    }  # fmt: skip
    try:
        if engine == "ray":
            report = pack_on_ray(src, dst, **options)
        else:
            report = pack_videos(src, dst, shard=shard, processes=processes, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    print("\n".join(report.lines()))
    print(f"packed: {dst}" if report.complete else f"packed: shard {shard} of {dst}; the last one completes the store")
    if (share := report.rejected_share()) > max_rejected:
        print(
            f"error: {share:.0%} of the videos are rejected, more than max_rejected = {max_rejected}; "
            f"see {dst.rstrip('/')}/quarantine.jsonl",
            file=sys.stderr,
        )
        return 1
    return 0
