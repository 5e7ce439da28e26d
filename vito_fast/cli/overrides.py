"""Arguments: typed functions and configurations, read by tyro; every complaint is one line.

A command is one of two things. A function gets its arguments from its signature. A frozen dataclass with a field
``config`` and a method ``run`` gets a configuration file first, then options of its own. Dotted names override any
field of the configuration.
"""

import contextlib
import dataclasses
import functools
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vito_fast.config import Config
from vito_fast.config_files import RENAMED, current_name, dotted_names, load_config, log, nearest
from vito_fast.errors import UserError

Place = Annotated[Path, tyro.conf.Positional]
"""A path given without an option's name."""
Address = Annotated[str, tyro.conf.Positional]
"""A store's folder or its address, as s3://bucket/store, given without an option's name."""


RENAMED_FLAGS = {("pack", "part"): "shard", ("pack", "patience"): "decode-timeout"}
"""Old names of flags, accepted for one release, by command; config.py has those of configurations."""


def run(command: str, target: Callable[..., Any], words: Sequence[str]) -> int:
    """Runs ``target``, a function or a configured command, with the words after ``vito-fast COMMAND``.

    Returns:
        The exit status.

    Raises:
        UserError: words that make no sense.
    """
    if getattr(target, "takes_words", False):
        return int(target(words))
    if isinstance(target, type):
        return int(configured(command, target, words).run())
    words = [_current_flag(command, word) for word in words]
    return int(parse(target, words, f"vito-fast {command}"))


def configured(command: str, kind: type, words: Sequence[str]) -> Any:
    """Reads a configuration file and the words after it.

    Args:
        command: Name of the command, for messages.
        kind: Frozen dataclass with a field ``config``; its other fields are options of the command.
        words: The configuration (a file or a preset's name), then options.

    Returns:
        A ``kind``.

    Raises:
        UserError: no configuration, or an unknown option, with the nearest name.
    """
    first = words[0] if words else ""
    if not first or (first.startswith("-") and first not in ("-h", "--help")):
        raise UserError(f"a configuration is missing: vito-fast {command} CONFIG.yaml, or the name of a preset")
    config, rest = (Config(), list(words)) if first.startswith("-") else (load_config(first), list(words[1:]))
    default = kind(config)
    known = [*dotted_names(config), *_options(default)]
    rest = _switches(config, rest)
    for i, word in enumerate(rest):
        name = _name(word)
        if word.startswith("--") and name in RENAMED:
            rest[i] = "--" + current_name(name, "command line") + word.removeprefix("--")[len(name) :]
        elif word.startswith("--") and name.replace(".no_", ".") not in known and name != "help":
            raise UserError(f"unknown option '{word}'{nearest(name, known)}")
    return parse(kind, rest, f"vito-fast {command} {first}", default=default)


def _switches(config: Config, words: list[str]) -> list[str]:
    """Writes ``--section.field true`` and ``false`` of a yes-or-no field as the flag that tyro knows."""
    result, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        section, _, key = _name(word).partition(".")
        current = getattr(getattr(config, section, None), key, None)
        if not word.startswith("--") or not isinstance(current, bool):
            result.append(word)
            continue
        value = word.partition("=")[2] or (queue.pop(0) if queue and queue[0].lower() in ("true", "false") else "true")
        if value.lower() not in ("true", "false"):
            raise UserError(f"{word.partition('=')[0]} must be true or false, got {value!r}")
        if (value.lower() == "true") != current:
            result.append(f"--{section}.{'no-' if current else ''}{key.replace('_', '-')}")
    return result


def _current_flag(command: str, word: str) -> str:
    flag, equals, value = word.removeprefix("--").partition("=")
    current = RENAMED_FLAGS.get((command, flag))
    if current is None or not word.startswith("--"):
        return word
    log.warning("--%s is now --%s; the next release drops the old name", flag, current)
    return f"--{current}{equals}{value}"


def _options(command: Any) -> list[str]:
    """The names of a command's own options; those of a nested dataclass have no prefix."""
    names = []
    for item in dataclasses.fields(command):
        value = getattr(command, item.name)
        if item.name != "config":
            names += _options(value) if dataclasses.is_dataclass(value) else [item.name]
    return names


def _name(word: str) -> str:
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def parse(function: Callable[..., Any], words: Sequence[str], program: str, **options: Any) -> Any:
    """Calls ``tyro.cli``, and turns its complaints into one-line UserErrors."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):  # of the parsing alone: the command itself prints freely
            ready: Any = tyro.cli(
                function if isinstance(function, type) else _deferred(function),
                args=list(words),
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
    return ready if isinstance(function, type) else ready()


def _deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that binds its arguments to ``function``, for a call after the parsing."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(function, *args, **kwargs)

    return bind


def _first_sentence(box: str) -> str:
    """The complaint in tyro's box and its suggestion of an option, as one line."""
    lines = [line.strip(" │╭╮╰╯|").strip() for line in box.splitlines()]
    lines = [line for line in lines if line]
    paragraphs: list[list[str]] = [[]]
    for line in lines[1:]:  # without the title
        if line.strip("─-"):
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    message = " ".join(next((paragraph for paragraph in paragraphs if paragraph), lines))
    meant = re.search(r"Perhaps you meant:\s*(--[\w.-]+)", " ".join(lines))
    return message + (f"; did you mean {meant[1]}?" if meant and "nrecognized" in message else "")
