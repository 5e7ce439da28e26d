"""``vito-fast COMMAND``: finds the command, reads its arguments, and turns a user's mistake into one line.

A command's module is imported when the command runs, so that ``--help`` waits for nothing heavy.
The exit status is 0 (done), 1 (failed), 2 (a mistake of the user's) or 128 + n (signal n; the state is saved).
"""

import difflib
import importlib
import io
import sys
from collections.abc import Sequence

from vito_fast.errors import UserError

COMMANDS = {
    "curate": ("vito_fast.cli.curate", "curate", "turn a heap of videos into a class-balanced, audited store"),
    "init": ("vito_fast.cli.init", "init", "propose a configuration for some videos and this machine"),
    "pack": ("vito_fast.cli.pack", "pack", "turn a folder of videos into a store"),
    "inspect-store": ("vito_fast.cli.store", "inspect_store", "verify a store and describe it"),
    "store": ("vito_fast.cli.store", "store", "append, merge and subset stores, and describe one"),
    "train": ("vito_fast.cli.train", "Train", "pretrain an encoder: vito-fast train CONFIG [--section.field VALUE]"),
    "lr-find": ("vito_fast.cli.train", "LrFind", "find a learning rate: vito-fast lr-find CONFIG [--steps N]"),
    "export": ("vito_fast.cli.export", "export", "write a run's encoder for torchvision or timm"),
    "features": ("vito_fast.cli.export", "features", "write an encoder's features of images or videos"),
    "evaluate": (
        "vito_fast.cli.evaluate",
        "evaluate",
        "score an encoder: vito-fast evaluate ENCODER --tasks NAMES",
    ),
    "card": ("vito_fast.cli.evaluate", "card", "set results side by side: vito-fast card DIR... OUT.html"),
    "attention": ("vito_fast.cli.export", "attention", "draw the encoder's attention in a video"),
    "plan": (
        "vito_fast.cli.plan",
        "Plan",
        "predict a run: vito-fast plan CONFIG --gpu h100 --gpus 8",
    ),
    "bench-data": ("vito_fast.cli.store", "bench_data", "time a store's loader alone"),
    "doctor": ("vito_fast.doctor", "doctor", "describe this machine and the code paths a run here will use"),
}
"""Name -> (module, function or configured command, help). See overrides.py for the two kinds of command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    try:
        return _dispatch(words)
    except UserError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("", "vito_fast", "vito_kernels"):
            raise
        return _fail(f"{error.name} is not installed: pip install 'vito-fast[train]'", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 2)
    except Exception as error:
        if getattr(error, "one_line", False):
            return _fail(str(error), 1)
        raise


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else _fail("a command is missing: " + ", ".join(COMMANDS), 2)
    if words[0] == "--version":
        from vito_fast import __version__

        print(f"vito-fast {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else f"; the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{name}'{hint}")
    from vito_fast.cli import overrides

    module, target, _ = COMMANDS[name]
    return overrides.run(name, getattr(importlib.import_module(module), target), rest)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: vito-fast COMMAND ...        (vito-fast COMMAND --help says more)", ""]
    return "\n".join(lines + [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()])


if __name__ == "__main__":
    sys.exit(main())
