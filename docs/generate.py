"""``python docs/generate.py [--check]``: writes docs/config.md and docs/cli.md from the code.

The configuration comes from the dataclasses and their field docstrings, the commands from their own ``--help``.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}  # the environment of the help texts


def field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def section(title: str, config: Any) -> str:
    docs = field_docs(type(config))
    lines = [
        f"## {title}",
        "",
        inspect.cleandoc(type(config).__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("``", "`"),
        "",
    ]
    lines += ["| field | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            cells = f"`{field.name}`", f"`{value!r}`", docs.get(field.name, "").replace("``", "`").replace("|", "\\|")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def config_page() -> str:
    from vito_fast.config import Config

    config = Config()
    head = """# Configuration

A run is described by a YAML file with the sections below. The command line overrides any field:
`vito-fast train demo --train.batch-size 16`. An unknown key or a wrong type is one line that names the key.
"""
    nested = [
        field.name for field in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, field.name))
    ]
    sections = [section(name, getattr(config, name)) for name in nested]
    return "\n\n".join([head.rstrip(), section("Run", config), *sections]) + "\n"


def option_rows(command: type) -> list[str]:
    rows, docs = [], field_docs(command)
    for field in dataclasses.fields(command):
        if isinstance(field.default_factory, type):
            rows += option_rows(field.default_factory)
        elif field.name in docs:
            text = docs[field.name].replace("``", "`").replace("|", "\\|")
            rows.append(f"| `--{field.name.replace('_', '-')}` | `{field.default!r}` | {text} |")
    return rows


def options_of(command: type) -> str:
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *option_rows(command)])


def cli_page() -> str:
    from vito_fast.cli.main import COMMANDS, main

    def help_of(*words: str) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*words, "--help"])
        return "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines())

    parts = [
        "# Commands",
        "A user's mistake is one line, and the exit status is 2. A failure is 1.",
        f"```text\n{help_of()}\n```",
    ]
    for name, (module, function, text) in COMMANDS.items():
        command = getattr(importlib.import_module(module), function)
        if isinstance(command, type):  # CONFIG and its overrides, then options of its own
            also = "Each field of [Configuration](config.md) is an option too."
            parts += [f"## vito-fast {name}", f"{text[0].upper()}{text[1:]}. {also}", options_of(command)]
        else:
            parts += [f"## vito-fast {name}", f"```text\n{help_of(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page differs")
    options = parser.parse_args()
    os.environ |= PLAIN
    different = 0
    for name, make in (("config.md", config_page), ("cli.md", cli_page)):
        made, path = make(), FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != made:
            different += 1
            print(f"{'differs from the code, run `make docs-reference`' if options.check else 'updated'}: docs/{name}")
            if not options.check:
                path.write_text(made, encoding="utf-8")
    return 1 if options.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
