"""The contract of a task, its presets, and the sharing of work among ranks.

A task is one benchmark. ``check`` looks at a copy of the data, ``measure`` scores an encoder on it, and ``run`` is
``measure`` with resume, provenance and cost around it. Presets live in ``configs/evaluate/TASK.yaml``: each names every
option of the task with its provenance, and the published figures that the result stands beside.
"""

import abc
import dataclasses
import hashlib
import importlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch.distributed as dist

from vito_fast.config_files import from_mapping, nearest, preset_files
from vito_fast.errors import UserError
from vito_fast.evaluate.result import Encoded, Metric, Result, cost_since, environment, finished, start_cost
from vito_fast.files import name_errors

if TYPE_CHECKING:
    from vito_fast.evaluate.encoders import Encoder

T = TypeVar("T")

PROVENANCE = ("paper", "rebuttal", "ancestor", "official", "ours")
"""paper, rebuttal: VITO's text or its authors' discussion. ancestor: exact, from code that the paper says it follows.
official: from the benchmark's own code or description. ours: this project's choice."""

TASKS = {
    "davis": "vito_fast.evaluate.davis_task:Davis",
    "attention": "vito_fast.evaluate.attention_task:Attention",
    "knn": "vito_fast.evaluate.folder_tasks:Knn",
    "linear": "vito_fast.evaluate.folder_tasks:Linear",
    "corruptions": "vito_fast.evaluate.folder_tasks:Corruptions",
    "pmk": "vito_fast.evaluate.folder_tasks:PmK",
    "correspondence": "vito_fast.evaluate.correspondence_task:Correspondence",
    "imagenet": "vito_fast.evaluate.imagenet_tasks:ImageNet",
    "imagenet_a": "vito_fast.evaluate.imagenet_tasks:ImageNetA",
    "imagenet_c": "vito_fast.evaluate.imagenet_tasks:ImageNetC",
    "imagenet_3dcc": "vito_fast.evaluate.imagenet_tasks:ImageNet3DCC",
    "vid_robust": "vito_fast.evaluate.imagenet_tasks:VidRobust",
    "shape_bias": "vito_fast.evaluate.imagenet_tasks:ShapeBias",
    "error_consistency": "vito_fast.evaluate.imagenet_tasks:ErrorConsistency",
    "clickme": "vito_fast.evaluate.saliency_task:ClickMe",
    "ucf101": "vito_fast.evaluate.ucf101:Ucf101",
    "pascal": "vito_fast.evaluate.segmentation_task:Pascal",
    "ade20k": "vito_fast.evaluate.segmentation_task:Ade20k",
    "coco": "vito_fast.evaluate.detection_task:Coco",
    "lvis": "vito_fast.evaluate.detection_task:Lvis",
}
"""Every task and its class, imported when asked for."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure printed elsewhere, and whether this project's protocol is the same."""

    metric: str
    value: float
    source: str
    same_protocol: bool
    because: str


@dataclasses.dataclass(frozen=True)
class Preset:
    """Options of a task under a name, where each value comes from, and the published figures."""

    task: str
    name: str
    options: Any
    provenance: Mapping[str, str]
    published: tuple[Published, ...] = ()

    def with_options(self, changes: Mapping[str, Any]) -> "Preset":
        """The preset with some options replaced, which are then ours. UserError for an unknown option or a wrong
        type."""
        if not changes:
            return self
        options = _options(self.options, changes, f"--{self.task}")
        changed = {key: "ours" for key in changes if getattr(options, key) != getattr(self.options, key)}
        name = self.name if not changed or self.name.endswith("*") else f"{self.name}*"
        return dataclasses.replace(self, name=name, options=options, provenance={**self.provenance, **changed})


@dataclasses.dataclass(frozen=True)
class Check:
    """A look at a copy of a data set, before anything is computed."""

    problems: tuple[str, ...] = ()
    """One line each; the task refuses to run while there are any."""
    items: int = 0
    """Sequences, images or videos that will be scored."""
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """``files``, ``bytes`` and ``sha256`` of names, sizes and annotations (``data.manifest``)."""
    forward_images: int = 0
    """Images that go forward through the encoder in all."""
    size: tuple[int, int] = (224, 224)
    """Height and width of such an image in pixels."""
    trains: bool = False
    """Whether those images go backward too."""
    memory: int = 0
    """Bytes needed beside the network's own, 0 if few."""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a task has found: the part of a ``Result`` that it alone knows."""

    metrics: Mapping[str, Metric]
    """The first is the one that cards show."""
    items: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)
    """Scores of each item by name: the pairs of a paired comparison. None for an item without a score."""
    groups: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)
    """Scores of each class or other group, by the group's name."""
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    media: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Pictures for the card: caption to a file's name in the task's folder."""
    notes: tuple[str, ...] = ()
    resamples: Mapping[str, Sequence[float | None]] = dataclasses.field(default_factory=dict)
    """Values of a metric over the bootstrap's ``draws`` of items, where it is no mean of items."""


class Task(abc.ABC):
    """One benchmark."""

    name: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[type]
    """A frozen dataclass; every field has a default and a provenance in each preset."""
    version: ClassVar[int] = 1
    """Raised by whoever changes a number that the task gives: older results are then stale."""

    @abc.abstractmethod
    def check(self, data: Path, options: Any) -> Check:
        """Looks at the data in seconds; decodes nothing large. Problems are lines in the answer, not exceptions."""

    @abc.abstractmethod
    def measure(self, encoder: "Encoder", data: Path, options: Any, work: Path) -> Measured:
        """Scores the encoder. ``work`` is the task's own folder, for checkpoints and pictures. Every rank calls it;
        every rank returns the same."""

    def run(self, encoder: "Encoder", data: Path, preset: Preset, out: Path) -> Result:
        """``measure`` unless ``out`` already holds its result for the same digests.

        Args:
            encoder: What is scored.
            data: The benchmark's folder.
            preset: Options, with their provenance.
            out: Results' folder; the result is ``out/ENCODER/TASK-PRESET.json``.
        Raises:
            UserError: for data that ``check`` finds wrong.
        """
        found = self.check(data, preset.options)
        if found.problems:
            more = f" (and {len(found.problems) - 1} more: see --check)" if len(found.problems) > 1 else ""
            raise UserError(f"{self.name}: {found.problems[0]}{more}")
        record = encoder.record
        key = self.key(preset, record, found.manifest)
        folder = out / folder_name(record)
        path = folder / f"{self.name}-{preset.name.rstrip('*')}.json"
        before = finished(path, key)
        if before is not None:
            return before
        work = folder / f"{self.name}-{preset.name.rstrip('*')}"
        if rank_and_size()[0] == 0:
            claim_folder(work, key)
        barrier()
        started = start_cost(encoder.device)
        with name_errors(work):
            measured = self.measure(encoder, data, preset.options, work)
        result = Result(
            task=self.name,
            preset=preset.name,
            options=json.loads(json.dumps(dataclasses.asdict(preset.options))),
            provenance=dict(preset.provenance),
            published=[dataclasses.asdict(figure) for figure in preset.published],
            key=key,
            encoder=record,
            data={"path": str(data), **found.manifest},
            metrics=dict(measured.metrics),
            items={name: dict(values) for name, values in measured.items.items()},
            groups={name: dict(values) for name, values in measured.groups.items()},
            resamples={name: list(values) for name, values in measured.resamples.items()},
            seeds=dict(measured.seeds),
            media=dict(measured.media),
            notes=[*found.notes, *measured.notes],
            environment=environment(encoder.device),
            cost=cost_since(started, encoder.device),
            complete=True,
        )
        if rank_and_size()[0] == 0:
            result.save(path)
        barrier()
        return result

    def key(self, preset: Preset, encoder: Encoded, manifest: Mapping[str, Any]) -> dict[str, str]:
        """The digests that a result stands for; another one in any of them makes it stale."""
        options = {"task": self.name, "version": self.version, "options": dataclasses.asdict(preset.options)}
        return {"preset": digest(options), "encoder": encoder.sha256, "data": str(manifest.get("sha256", ""))}


def folder_name(encoder: Encoded) -> str:
    """The folder of an encoder's results: its name, and enough of its digest to keep two of one name apart."""
    return f"{encoder.name}-{encoder.sha256[:8]}"


def claim_folder(work: Path, key: Mapping[str, str]) -> None:
    """Makes a task's folder; empties it first if it was another key's. Rank 0 alone calls it."""
    import shutil

    mark = work / "key.json"
    text = json.dumps(dict(key), sort_keys=True)
    if mark.is_file() and mark.read_text(encoding="utf-8") == text:
        return
    if work.is_dir():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    mark.write_text(text, encoding="utf-8")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def find_task(name: str) -> Task:
    """The task of that name. UserError, with the nearest name, if there is none."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'{nearest(name, list(TASKS))} (the tasks are {', '.join(TASKS)})")
    module, _, kind = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), kind)()
    return task


def presets(task: Task) -> dict[str, Preset]:
    """The task's presets by name, the default first. UserError for a file that does not say all of it."""
    path = preset_folder() / f"{task.name}.yaml"
    return read_presets(path, task)


def preset_folder() -> Path:
    """``configs/evaluate``, installed or of a checkout."""
    return preset_files()[0].parent / "evaluate"


def read_presets(path: Path, task: Task) -> dict[str, Preset]:
    """The presets in a file; see ``presets``."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the presets {path}: {' '.join(str(error).split())}") from None
    found = {}
    for name, body in loaded.items():
        values = {key: field["value"] for key, field in body["options"].items()}
        provenance = {key: field["from"] for key, field in body["options"].items()}
        missing = {field.name for field in dataclasses.fields(task.options)} - set(values)
        if missing:
            raise UserError(f"{path}: preset '{name}' says nothing of {', '.join(sorted(missing))}")
        for key, word in provenance.items():
            if word.split(":")[0] not in PROVENANCE:
                raise UserError(f"{path}: '{name}.{key}' comes from {word!r}; say one of {', '.join(PROVENANCE)}")
        figures = tuple(Published(**figure) for figure in body.get("published", ()))
        options = _options(task.options(), values, f"{path}: {name}")
        found[name] = Preset(task.name, name, options, provenance, figures)
    return found


def find_preset(task: Task, name: str | None) -> Preset:
    """A preset by name, the first by default. UserError, with the names, if there is none."""
    known = presets(task)
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        raise UserError(f"{task.name} has no preset '{name}': choose from {', '.join(known)}")
    return known[name]


def _options(base: T, values: Mapping[str, Any], source: str) -> T:
    known = [field.name for field in dataclasses.fields(base)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"{source}: unknown option '{key}'{nearest(key, known)}")
    return from_mapping(base, dict(values), source)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Waits for all ranks; returns at once without a process group."""
    if rank_and_size()[1] > 1:
        dist.barrier()


def own_share(items: Sequence[T]) -> list[T]:
    """This rank's items: every size-th, from its rank on."""
    rank, size = rank_and_size()
    return list(items[rank::size])


def gathered(own: Mapping[str, T], order: Iterable[str]) -> dict[str, T]:
    """The results of all ranks by name, in the given order, on every rank."""
    parts: list[Any] = [dict(own)]
    if rank_and_size()[1] > 1:
        parts = [None] * rank_and_size()[1]
        dist.all_gather_object(parts, dict(own))
    merged = {name: value for part in parts for name, value in part.items()}
    return {name: merged[name] for name in order}


class Progress:
    """A line on standard error every few seconds: done of all, rate, time left. Rank 0 alone prints."""

    def __init__(self, label: str, total: int, every: float = 5.0) -> None:
        self.label, self.total, self.every = label, total, every
        self.done, self.start = 0, time.monotonic()
        self.shown = self.start

    def step(self, count: int = 1) -> None:
        """Counts ``count`` more."""
        import sys

        self.done += count
        now = time.monotonic()
        if now - self.shown >= self.every and rank_and_size()[0] == 0:
            self.shown = now
            rate = self.done / (now - self.start)
            left = (self.total - self.done) / rate
            print(f"{self.label}: {self.done}/{self.total}, {rate:.3g}/s, {left:.0f} s left", file=sys.stderr)
