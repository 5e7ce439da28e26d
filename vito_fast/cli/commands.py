"""The commands: their arguments and help (read by tyro), and the line that says what each has made.

Each returns the exit status. Imports are inside, so that ``--help`` does not wait for torch.
"""

import dataclasses
import logging
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vito_fast.config import Config, current_name, dotted_names, load_config, nearest
from vito_fast.data.formats import FormatName
from vito_fast.errors import UserError

Place = Annotated[Path, tyro.conf.Positional]
"""A path given without an option's name."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Pretrain an encoder.

    usage: vito-fast train CONFIG [--resume] [--section.field VALUE ...], where CONFIG is a YAML file or a shipped
    preset.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run of this name from its newest whole checkpoint, or start it if there is none."""
    max_steps: int | None = None
    """Stop after this many steps; the schedules stay those of the whole run."""
    profile: bool = False
    """Trace a few steps after the first ten into the run's folder, profile/, for Perfetto or chrome://tracing."""
    dry_run: bool = False
    """Run one CUDA step without data or GPU: what it computes and keeps in memory, and what would go wrong."""


def train_arguments(arguments: list[str], parse: Callable[..., Any]) -> tuple[Config, TrainOptions]:
    """Configuration file and overrides from the words after ``vito-fast train``."""
    options = configured("train", arguments, parse, TrainOptions, ("resume", "max_steps", "profile", "dry_run"))
    return options.config, options


def configured(
    command: str, arguments: Sequence[str], parse: Callable[..., Any], kind: Callable[[Config], Any], own: Iterable[str]
) -> Any:
    """What a ``kind`` reads from a configuration file and the words after it: options of the names ``own``, and
    overrides. UserError for a missing configuration or an unknown option, with the nearest one's name."""
    first = arguments[0] if arguments else ""
    if not first or (first.startswith("-") and first not in ("-h", "--help")):
        raise UserError(f"a configuration is missing: vito-fast {command} CONFIG.yaml, or the name of a preset")
    config, rest = (Config(), arguments) if first.startswith("-") else (load_config(first), arguments[1:])
    rest = [_current(word) for word in rest]
    known = [*dotted_names(config), *own]
    for word in rest:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and name.replace(".no_", ".") not in known and name != "help":
            raise UserError(f"unknown option '{word}'{nearest(name, known)}")
    return parse(kind, list(rest), f"vito-fast {command} {first}", default=kind(config))


def _current(word: str) -> str:
    """A word of the command line, its option under the field's current name."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    written = name.replace("-", "_")
    current = current_name(written, "command line")
    return word if current == written else f"--{current}{equals}{value}"


def train(config: Config, options: TrainOptions) -> int:
    """Pretrain an encoder."""
    if options.dry_run:
        from vito_fast.plan.report import report_dry_run

        return report_dry_run(config)
    from vito_fast.train.loop import train as run

    summary = run(config, resume=options.resume, max_steps=options.max_steps, profile=options.profile)
    stopped_by = summary.get("signal")
    return 128 + signal.Signals[stopped_by] if stopped_by else 0


def export(
    run: Place,
    out: Place,
    format: Literal["torchvision", "timm"] = "torchvision",
    ext: Literal["safetensors", "pth"] | None = None,
    network: Literal["online", "target"] = "online",
) -> int:
    """Write a run's encoder so that a plain torchvision or timm network loads it.

    Args:
        run: A run's folder, or one checkpoint file.
        out: The file to write; without .safetensors or .pth at its end, --ext is added.
        format: Whose names and conventions the file follows.
        ext: safetensors (the default) or pth.
        network: The network that learned, or its moving average.
    """
    from vito_fast.export import export as write

    path, hint = write(run, out, format, ext, network)
    print(f"load it with: {hint}")
    print(f"exported: {path}")
    return 0


def attention(run: Place, video: Place, out: Place, frames: int = 6, size: int = 224) -> int:
    """Draw where the encoder looks in a video: frames above, the attention of each scale below.

    Args:
        run: A run's folder, or one checkpoint file.
        video: Any video file; or a store, for one frame of each of several clips.
        out: The PNG to write.
        frames: How many, evenly spaced over the video or store.
        size: Short side of each frame in pixels.
    """
    from vito_fast.train.attention_maps import draw

    draw(run, video, out, frames, size)
    print(f"drawn: {out}")
    return 0


def doctor() -> int:
    """Say what this machine can do, and what will be used."""
    from vito_fast.doctor import report

    print(report())
    return 0


def pack(
    src: Place,
    dst: Place,
    format: FormatName = "jpeg",
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
) -> int:
    """Turn a folder of videos into a store. Safe to kill and to repeat.

    Args:
        src: A folder of videos, searched through, or one video.
        dst: The store to write.
        format: jpeg (any frame in one read), h264 (short groups of pictures) or copy (no re-encoding).
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
    """
    from vito_fast.data.pack import pack as pack_videos

    logging.basicConfig(format="%(message)s")
    logging.getLogger("vito_fast.data").setLevel(logging.INFO)
    try:
        report = pack_videos(
            src, dst, format=format, short_side=short_side, quality=quality, crf=crf, gop=gop, encoder=encoder,
            clip_length=clip_length, min_length=min_length, shot_cuts=shot_cuts, shard_mib=shard_mib, shard=shard,
            processes=processes, decode_timeout=decode_timeout,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    print("\n".join(report.lines()))
    print(f"packed: {dst}" if report.complete else f"packed: shard {shard} of {dst}; the last one completes the store")
    return 0


def inspect_store(
    store: Place,
    sheet: Path | None = None,
    pictures: int = 24,
    verify: Annotated[bool, tyro.conf.FlagConversionOff] = True,
    threads: int = 0,
) -> int:
    """Verify a store's checksums, say what it holds and draw a contact sheet.

    Args:
        store: A folder written by vito-fast pack.
        sheet: The PNG to draw; by default contact-sheet.png in the store.
        pictures: Clips on it, evenly spaced over the store.
        verify: Whether to read every packet and compare its checksum.
        threads: 0 = as many as cores.
    """
    from vito_fast.data.store.inspect import inspect_store as inspect

    sheet = sheet or store / "contact-sheet.png"
    try:
        found = inspect(store, verify=verify, sheet=sheet, pictures=pictures, threads=threads)
    except ValueError as error:
        raise UserError(str(error)) from None
    print("\n".join(found.lines()))
    if found.damaged:
        raise UserError(
            f"{len(found.damaged)} of {found.clips} clips of {store} are damaged; delete the store and pack again"
        )
    return 0


def bench_data(
    store: Place,
    originals: Path | None = None,
    batch: int = 32,
    seconds: float = 10.0,
    size: int = 224,
    threads: int = 0,
    pairs: int = 16,
    rounds: int = 5,
    output: Path | None = None,
) -> int:
    """Time a store's loader, and its decoding beside that of the public readers that are installed.

    Args:
        store: A folder written by vito-fast pack.
        originals: The folder that was packed: the public readers then read its files, not the store's clips.
        batch: Clips a batch; fewer if the store holds fewer.
        seconds: How long to measure the loader.
        size: Side of a view in pixels.
        threads: Decoding threads of the loader; 0 = as many as cores. Decoding is compared on one.
        pairs: Frame pairs a round of the comparison.
        rounds: Rounds of the comparison.
        output: File to write all figures to, as JSON.
    """
    import json

    from vito_fast.data import bench_data as bench
    from vito_fast.files import check_writable

    if output is not None:
        check_writable(output)
    try:
        result = bench.bench_data(
            store, originals=originals, batch_size=batch, seconds=seconds, size=size, threads=threads, pairs=pairs,
            rounds=rounds,
        )  # fmt: skip
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    print("\n".join(bench.lines(result)))
    return 0
