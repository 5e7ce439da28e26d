"""Configurations as YAML files and plain mappings: strict loading, old names, presets."""

import dataclasses
import difflib
import logging
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vito_fast.config import Config
from vito_fast.errors import UserError
from vito_fast.files import atomic_write

log = logging.getLogger("vito_fast")

T = TypeVar("T")

LEGACY: dict[str, dict[str, Any]] = {
    "model": {"heads": "per_level", "predictor": True, "batch_norm": "joint"},
    "sampler": {"views": 2, "crop_fit": "retry", "blur": [1.0, 0.1], "solarize": [0.0, 0.2]},
    "schedule": {"epoch_clips": 0},
}
"""Defaults of version 0.1, which predate the paper's text. Its files and checkpoints keep their meaning."""

RENAMED = {
    "loss.kind": "loss.name",
    "model.scales": "model.levels",
    "optimizer.eta": "optimizer.trust_coefficient",
    "sampler.area": "sampler.crop_area",
    "sampler.aspect": "sampler.crop_aspect",
    "sampler.grey": "sampler.grayscale",
    "sampler.sigma": "sampler.blur_sigma",
    "sampler.solarise": "sampler.solarize",
    "sampler.window": "sampler.frame_window",
}
"""Old dotted names of fields, accepted for one release in files and on the command line. A section never changes."""


def load_config(path: str | Path) -> Config:
    """Loads a YAML file over the defaults.

    ``extends: other.yaml`` (relative to the file, or a shipped preset) starts from another file. A run without ``name``
    has the file's.

    Args:
        path: A file, or the name of a shipped preset.

    Raises:
        UserError: a missing file, an unknown key, a wrong type or a value out of range. The message names file, key and
            the nearest valid name.
    """
    found = find_preset(path)
    return _load(found, (), {"name": found.stem})


def _load(path: Path, seen: tuple[str, ...], default: dict[str, Any]) -> Config:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of the file, its encoding, or a malformed date or number
        raise UserError(f"cannot read the configuration {path}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not a configuration: nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    mapping = {} if loaded is None else loaded
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: a configuration is a mapping of names to values, not a {type(mapping).__name__}")
    parent = mapping.pop("extends", None)
    if parent is None:
        base = _base(mapping, str(path))
    else:
        here = os.path.realpath(path)
        if here in seen:
            raise UserError(f"{path}: 'extends' goes in a circle")
        beside = path.parent / str(parent)
        base = _load(beside if beside.exists() else _shipped(str(parent)) or beside, (*seen, here), {})
    return from_mapping(base, default | mapping, str(path))


def _base(mapping: dict[Any, Any], source: str) -> Config:
    """The defaults for a file's mapping: those of version 0.1 if it has names of that version and no later ones."""
    names = {f"{section}.{name}" for section, given in mapping.items() if isinstance(given, dict) for name in given}
    later = {*RENAMED.values(), "model.heads", "schedule.epoch_clips"}
    if not names & RENAMED.keys() or names & later:
        return Config()
    kept = ", ".join(f"{s}.{name} {value}" for s, given in LEGACY.items() for name, value in given.items())
    log.warning("%s: of version 0.1, whose defaults it keeps: %s", source, kept)
    return legacy_defaults()


def legacy_defaults() -> Config:
    """The defaults of version 0.1."""
    return from_mapping(Config(), LEGACY, "version 0.1")


def find_preset(path: str | Path) -> Path:
    """The file itself, or the shipped preset of that name. UserError with the presets' names if neither exists."""
    wanted = Path(path)
    if wanted.exists():
        return wanted
    if (preset := _shipped(str(path))) is not None:
        return preset
    names = ", ".join(preset.stem for preset in preset_files())
    raise UserError(f"no configuration {wanted}: give a YAML file, or one of the presets {names}")


def _shipped(name: str) -> Path | None:
    """The preset of that name, with or without .yaml."""
    return next((preset for preset in preset_files() if name in (preset.name, preset.stem)), None)


def preset_files() -> list[Path]:
    """The presets that ship with the package (installed, or configs/ of a checkout), sorted by name."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml"))
    return []


def from_mapping(base: T, mapping: dict[Any, Any], source: str, prefix: str = "", notice: bool = True) -> T:
    """Replaces the fields of ``base``, a frozen dataclass, by those of ``mapping``, with their types checked.

    Args:
        base: Values of fields that the mapping lacks.
        mapping: Nested, as from YAML.
        source: The file's name, for messages.
        prefix: Dotted name of the section, with a dot at its end.
        notice: Whether to log old names.

    Raises:
        UserError: as ``load_config``.
    """
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for written, value in mapping.items():
        name = f"{prefix}{written}"
        key = (current_name(name, source) if notice else RENAMED.get(name, name)).removeprefix(prefix)
        if key in changes:
            raise UserError(f"{source}: '{prefix}{key}' is given twice, as '{prefix}{written}' too: remove one")
        if key not in hints:
            raise UserError(f"{source}: unknown key '{prefix}{key}'{nearest(f'{prefix}{key}', dotted_names(Config()))}")
        current = getattr(base, key)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(f"{source}: '{prefix}{key}' is a section with fields of its own, got {value!r}")
            changes[key] = from_mapping(current, value, source, f"{prefix}{key}.", notice)
        else:
            changes[key] = _convert(value, hints[key], f"{source}: '{prefix}{key}'")
    try:
        return replace(base, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def current_name(name: str, source: str) -> str:
    """Replace a field's old dotted name (see RENAMED) and log a notice that names ``source``."""
    if name in RENAMED:
        log.warning("%s: %s is now %s; the next release drops the old name", source, name, RENAMED[name])
    return RENAMED.get(name, name)


def dotted_names(config: Any, prefix: str = "") -> list[str]:
    """Every field of a dataclass tree by its dotted name, sections included."""
    names = []
    for item in fields(config):
        names.append(prefix + item.name)
        value = getattr(config, item.name)
        if is_dataclass(value):
            names += dotted_names(value, f"{prefix}{item.name}.")
    return names


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the known name nearest to ``name``, also when only the section is wrong."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not match:
        last = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        match = last or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean '{match[0]}'?" if match else ""


def _convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as YAML gave it, checked against the field's type; lists become tuples, and whole numbers floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value in args:
            return value
        choices = [str(a) for a in args]
        raise UserError(f"{where} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or (Ellipsis not in args and len(value) != len(args)):
            raise UserError(f"{where} must be a list of {_length(args)}, got {value!r}")
        kinds = [args[0]] * len(value) if Ellipsis in args else list(args)
        return tuple(_convert(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where} must be a number, got {value!r}") from None
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if hint is str and "\0" in str(value):
        raise UserError(f"{where} must be text without NUL, got {value!r}")
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise UserError(f"{where} must be {_TYPE_NAMES[hint]}, got {value!r} ({type(value).__name__})")
    return value


_TYPE_NAMES = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}


def _length(args: tuple[Any, ...]) -> str:
    return "texts" if args[0] is str else "numbers" if Ellipsis in args else f"{len(args)} numbers"


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dictionaries (tuples as lists), as saved in checkpoints and config.yaml."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def save_config(config: Config, path: Path) -> None:
    """Writes the whole configuration as YAML that ``load_config`` reads back to an equal object."""
    import yaml

    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False), encoding="utf-8")


def method_differences(a: Config, b: Config) -> list[str]:
    """Dotted names of differing fields that change the result; a run cannot resume with another value of them."""
    left, right = to_mapping(a), to_mapping(b)

    def value(mapping: Any, dotted: str) -> Any:
        for part in dotted.split("."):
            mapping = mapping[part]
        return mapping

    names = [n for n in dotted_names(a) if n in _METHOD_OF_TRAIN or n.split(".")[0] not in ("name", "data", "train")]
    names = [n for n in names if n != "model.checkpoint_activations" and not isinstance(value(left, n), dict)]
    return [n for n in names if value(left, n) != value(right, n)]


def with_changes(config: Config, changes: Sequence[str]) -> Config:
    """The configuration with ``section.field=value`` of each of ``changes``: those that a run may take when it resumes.

    UserError for another field, or a value that makes no sense.
    """
    import yaml

    for change in changes:
        name, equals, text = change.partition("=")
        section, _, key = name.partition(".")
        if not equals or name not in dotted_names(config):
            raise UserError(f"--resume-with {change!r} is no section.field=value{nearest(name, dotted_names(config))}")
        if name not in changeable(config):
            raise UserError(
                f"--resume-with {name}: a run cannot change it; it can change {', '.join(changeable(config))}"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        config = from_mapping(config, {section: {key: value}}, "--resume-with")
    return config


def changeable(config: Config) -> list[str]:
    """Fields of the method that a run may change when it resumes."""
    names = [n for n in dotted_names(config) if n.startswith(("optimizer.", "schedule."))]
    return [*(n for n in names if n != "optimizer.name"), "train.micro_batches"]


_METHOD_OF_TRAIN = ("train.batch_size", "train.micro_batches")
