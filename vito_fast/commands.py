"""The commands: their arguments and help (read by tyro), and the line that says what each has made.

Each returns the exit status. Imports are inside, so that ``--help`` does not wait for torch.
"""

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vito_fast.config import Config, dotted_names, load_config, nearest
from vito_fast.errors import UserError

Argument = tyro.conf.Positional


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Pretrain an encoder.

    usage: vito-fast train CONFIG [--resume] [--section.field VALUE ...], where CONFIG is a YAML file or a shipped preset.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run of this name from its newest whole checkpoint, or start it if there is none."""
    max_steps: int | None = None
    """Stop after this many steps; the schedules stay those of the whole run."""


def train_arguments(arguments: list[str], parse: Callable[..., Any]) -> tuple[Config, TrainOptions]:
    """Configuration file and overrides from the words after ``vito-fast train``."""
    first = arguments[0] if arguments else ""
    if not first or (first.startswith("-") and first not in ("-h", "--help")):
        raise UserError("a configuration is missing: vito-fast train CONFIG.yaml, or the name of a preset")
    config, rest = (Config(), arguments) if first.startswith("-") else (load_config(first), arguments[1:])
    known = [*dotted_names(config), "resume", "max_steps"]
    for word in rest:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known and name not in ("help",):
            raise UserError(f"unknown option '{word}'{nearest(name, known)}")
    options = parse(TrainOptions, rest, f"vito-fast train {first}", default=TrainOptions(config=config))
    return options.config, options


def train(config: Config, options: TrainOptions) -> int:
    """Pretrain an encoder."""
    from vito_fast.train import train as run

    summary = run(config, resume=options.resume, max_steps=options.max_steps)
    stopped_by = summary.get("signal")
    return 128 + signal.Signals[stopped_by] if stopped_by else 0


def export(
    run: Argument[Path],
    out: Argument[Path],
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


def attention(
    run: Argument[Path], video: Argument[Path], out: Argument[Path], frames: int = 6, size: int = 224
) -> int:
    """Draw where the encoder looks in a video: frames above, the attention of each scale below.

    Args:
        run: A run's folder, or one checkpoint file.
        video: Any video file.
        out: The PNG to write.
        frames: How many, evenly spaced over the video.
        size: Short side of each frame in pixels.
    """
    from vito_fast.attention import draw

    draw(run, video, out, frames, size)
    print(f"drawn: {out}")
    return 0


def doctor() -> int:
    """Say what this machine can do, and what will be used."""
    from vito_fast.doctor import report

    print(report())
    return 0
