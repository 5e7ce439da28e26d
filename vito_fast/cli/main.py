"""``vito-fast COMMAND``: finds the command, reads its arguments, and turns a user's mistake into one line.

Commands and their help are the functions of commands.py, read by tyro; nothing heavy is imported before a command runs.
Exit status: 0 done; 1 failed; 2 a mistake of the user's; 128 + n ended by signal n, its state saved.
"""

import contextlib
import difflib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vito_fast.errors import UserError

COMMANDS = {
    "pack": "turn a folder of videos into a store",
    "inspect-store": "say what a store holds",
    "train": "pretrain an encoder: vito-fast train CONFIG [--section.field VALUE]",
    "export": "write a run's encoder for torchvision or timm",
    "plan": "predict a run's time, memory and energy: vito-fast plan CONFIG --gpu h100 --gpus 8",
    "attention": "draw where the encoder looks in a video",
    "bench-data": "time a store's loader alone",
    "doctor": "say what this machine can do, and what will be used",
}
"""Every command with its line of help; the function in commands.py has the same name, with underscores."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    try:
        return _dispatch(arguments)
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


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else _fail("a command is missing: " + ", ".join(COMMANDS), 2)
    if arguments[0] == "--version":
        from vito_fast import __version__

        print(f"vito-fast {__version__}")
        return 0
    name, *rest = arguments
    rest = [_current_flag(name, word) for word in rest]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else f"; the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{name}'{hint}")
    if name == "plan":
        from vito_fast.plan.report import run

        return run(rest, parse)
    from vito_fast.cli import commands

    function = getattr(commands, name.replace("-", "_"))
    if name == "train":
        return commands.train(*commands.train_arguments(rest, parse))
    return int(parse(function, rest, f"vito-fast {name}"))


RENAMED_FLAGS = {("pack", "--part"): "--shard", ("pack", "--patience"): "--decode-timeout"}
"""Old names of flags, accepted for one release, by command."""


def _current_flag(command: str, word: str) -> str:
    flag, equals, value = word.partition("=")
    current = RENAMED_FLAGS.get((command, flag))
    if current is None:
        return word
    print(f"{flag} is now {current}; the next release drops the old name", file=sys.stderr)
    return current + equals + value


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: vito-fast COMMAND ...        (vito-fast COMMAND --help says more)", ""]
    return "\n".join(lines + [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()])


def parse(function: Callable[..., Any], arguments: list[str], program: str, **options: Any) -> Any:
    """``tyro.cli``, whose complaints become one-line UserErrors."""
    import tyro

    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):  # of the parsing alone: the command itself prints freely
            ready: Any = tyro.cli(
                function if isinstance(function, type) else _deferred(function),
                args=arguments,
                prog=program,
                config=(tyro.conf.FlagCreatePairsOff,),
                **options,
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_first_sentence(caught.getvalue())) from None
        raise
    except ValueError as error:  # of the configuration as a whole: tyro brings those of its sections
        raise UserError(str(error)) from None
    return ready() if callable(ready) else ready


def _deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, but called with its arguments only when the result is called."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(function, *args, **kwargs)

    return bind


def _first_sentence(box: str) -> str:
    """The complaint in tyro's box, and the option it thinks was meant, as one line."""
    lines = [line.strip(" │╭╮╰╯|").strip() for line in box.splitlines()]
    lines = [line for line in lines if line]
    parts: list[list[str]] = [[]]
    for line in lines[1:]:  # without the title
        if line.strip("─-"):
            parts[-1].append(line)
        else:
            parts.append([])
    message = " ".join(next((part for part in parts if part), lines))
    meant = re.search(r"Perhaps you meant:\s*(--[\w.-]+)", " ".join(lines))
    return message + (f"; did you mean {meant[1]}?" if meant and "nrecognized" in message else "")


if __name__ == "__main__":
    sys.exit(main())
