"""``vito-fast pack``."""

import logging
from typing import Annotated, Literal

import tyro

from vito_fast.cli.overrides import Place
from vito_fast.data.store.description import FORMATS, JPEG, FormatName, Limits
from vito_fast.errors import UserError

FORMAT_HELP = "; ".join(f"{format.name}: {format.summary}" for format in FORMATS.values()) + "."


def pack(
    src: Place,
    dst: Place,
    format: Annotated[FormatName, tyro.conf.arg(help=FORMAT_HELP)] = JPEG.name,
    short_side: int = 256,
    quality: int = 90,
    crf: int = 20,
    gop: int = 8,
    encoder: Literal["auto", "libx264", "h264_nvenc"] = "auto",
    clip_length: float = 10.0,
    min_length: float = 1.0,
    shot_cuts: Annotated[bool, tyro.conf.FlagConversionOff] = True,
    shard_mib: int = 256,
    shard: str = "1/1",
    processes: int = 0,
    decode_timeout: float = 120.0,
    limits: Limits = Limits(),
) -> int:
    """Turn a folder of videos into a store. Safe to kill and to repeat.

    Args:
        src: A folder of videos, searched through, or one video.
        dst: The store to write.
        short_side: Short side of a frame in pixels. Smaller videos keep their size.
        quality: JPEG quality, 1 to 100.
        crf: Constant rate factor of h264 stores, 0 to 51, lower is better.
        gop: Frames from key to key of h264 stores.
        encoder: Encoder of h264 stores. auto is h264_nvenc where it works, else libx264.
        clip_length: Seconds after which a shot is split.
        min_length: Seconds. Shorter shots are left out.
        shot_cuts: Whether clips end at shot changes.
        shard_mib: Size in MiB after which a new shard file begins.
        shard: i/n packs the i-th of n shares of the files, for n machines.
        processes: Worker processes, 0 = one per core. One of them packs a whole file.
        decode_timeout: Seconds without a decoded frame after which a file is rejected.
        limits: Wall time, frames, pixels and memory of one file, after which it is rejected.
    """
    from vito_fast.data.pack import pack as pack_videos

    logging.basicConfig(format="%(message)s")
    logging.getLogger("vito_fast.data").setLevel(logging.INFO)
    try:
        report = pack_videos(
            src, dst, format=format, short_side=short_side, quality=quality, crf=crf, gop=gop, encoder=encoder,
            clip_length=clip_length, min_length=min_length, shot_cuts=shot_cuts, shard_mib=shard_mib, shard=shard,
            processes=processes, decode_timeout=decode_timeout, limits=limits,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    print("\n".join(report.lines()))
    print(f"packed: {dst}" if report.complete else f"packed: shard {shard} of {dst}; the last one completes the store")
    return 0
