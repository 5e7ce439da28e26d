"""``vito-fast evaluate`` and ``vito-fast card``."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vito_fast.cli.overrides import parse
from vito_fast.config_files import nearest
from vito_fast.errors import UserError


def evaluate(words: Sequence[str]) -> int:
    """Scores an encoder; see ``_evaluate`` for the options.

    ``--data.TASK PATH`` and ``--TASK.OPTION VALUE`` are read here, since their names depend on the tasks.
    """
    from vito_fast.evaluate.task import TASKS

    rest: list[str] = []
    dotted: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            rest.append(word)
            continue
        head = name.split(".")[0]
        if head not in ("data", *TASKS):
            raise UserError(f"unknown option '{word}'{nearest(head, ['data', *TASKS])}")
        if not equals and not queue:
            raise UserError(f"{word} needs a value")
        dotted[name] = value if equals else queue.pop(0)
    data = {name.removeprefix("data."): Path(v) for name, v in dotted.items() if name.startswith("data.")}
    changes: dict[str, dict[str, Any]] = {}
    for name, text in dotted.items():
        task, _, option = name.partition(".")
        if task != "data":
            changes.setdefault(task, {})[option.replace("-", "_")] = _value(text)

    def evaluate(
        encoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")],
        tasks: str,
        out: Path = Path("evaluation"),
        preset: str = "",
        baselines: str = "",
        check: bool = False,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        seed: int = 0,
    ) -> int:
        """Score an encoder by published protocols; write results and a card.

        usage: vito-fast evaluate ENCODER --tasks davis,ucf101 --data.davis PATH --data.ucf101 PATH --out DIR

        Args:
            encoder: A run, a checkpoint, a .safetensors or .pth file, timm:NAME, timm:NAME@FILE, random or pixels.
            tasks: Names with commas between them; --data.TASK PATH gives each its data.
            out: Folder of results. A complete result with the same digests is not computed again.
            preset: Of every task that has it, or task=preset,... with commas; by default each task's first.
            baselines: random, pixels, imagenet or any encoder, with commas between them.
            check: Verify the data, say time and memory, and stop.
            device: auto takes a GPU where there is one.
            seed: Of the random baseline's weights.
        """
        command = shlex.join(["vito-fast", "evaluate", *words])
        return _run(encoder, tasks, data, changes, out, preset, baselines, check, device, seed, command)

    return int(parse(evaluate, rest, "vito-fast evaluate"))


evaluate.takes_words = True  # type: ignore[attr-defined]  # overrides.run hands it the words as they are


def _run(
    source: str,
    tasks: str,
    data: dict[str, Path],
    changes: dict[str, dict[str, Any]],
    out: Path,
    preset: str,
    baselines: str,
    check: bool,
    device: Literal["auto", "cpu", "cuda"],
    seed: int,
    command: str,
) -> int:
    from vito_fast.evaluate import encoders, run
    from vito_fast.evaluate.card import write_card
    from vito_fast.train.distributed import init_distributed, shutdown

    names = _names(tasks, "--tasks")
    jobs = _jobs(names, preset, data, changes)
    world = init_distributed(device)
    failed = True
    try:
        encoder = encoders.load(source, world.device, seed=seed)
        checked = [(job, job.task.check(job.data, job.preset.options)) for job in jobs]
        wrong = [(job, found) for job, found in checked if found.problems]
        if check:
            for job, found in checked if world.main else ():
                seconds = None if found.problems else run.seconds_of(encoder, found)
                print("\n".join(run.check_lines(job, found, seconds)), flush=True)
            failed = False
            return 2 if wrong else 0
        if wrong:
            job, found = wrong[0]
            raise UserError(f"{job.task.name}: {found.problems[0]} (--check shows all problems)")

        def tell(line: str) -> None:
            if world.main:
                print(line, flush=True)

        beside = encoders.baselines(_names(baselines, ""), encoder, seed=seed)
        others = [one for one in beside if one.record.sha256 != encoder.record.sha256]
        results = run.evaluate([encoder, *others], jobs, out, command, tell)
        for line in run.comparisons(results, encoder.record.sha256):
            tell(line)
        if world.main and results:
            write_card([out], out / "card.html")
        tell(f"evaluated: {out / 'card.html'}")
        failed = False
    finally:
        shutdown(failed=failed)
    return 0


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if option and not names:
        raise UserError(f"{option} names no task")
    return names


def _jobs(names: list[str], preset: str, data: dict[str, Path], changes: dict[str, dict[str, Any]]) -> list[Any]:
    from vito_fast.evaluate.run import Job
    from vito_fast.evaluate.task import find_preset, find_task, presets

    for name in (*data, *changes):
        if name not in names:
            raise UserError(f"--data.{name} or --{name}.* is of a task that --tasks lacks{nearest(name, names)}")
    own = dict(part.split("=", 1) for part in preset.split(",") if "=" in part)
    shared = [part for part in preset.split(",") if part and "=" not in part]
    used, jobs = set(), []
    for name, task in [(name, find_task(name)) for name in names]:
        if name not in data:
            raise UserError(f"{name} needs its data: --data.{name} PATH (docs/evaluate/{name}.md says where to get it)")
        known = presets(task)
        chosen = own.get(name) or next((p for p in shared if p in known), None)
        used |= {chosen, name}
        jobs.append(Job(task, find_preset(task, chosen).with_options(changes.get(name, {})), data[name]))
    for word in (*shared, *own):
        if word not in used:
            raise UserError(f"--preset {word}: none of {', '.join(names)} has it")
    return jobs


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def card(folders: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> int:
    """Write one page that sets encoders side by side: vito-fast card DIR... OUT.html

    Args:
        folders: Folders of results, and last the page to write.
    """
    from vito_fast.evaluate.card import write_card

    *sources, out = folders
    if not sources or out.suffix.lower() not in (".html", ".htm"):
        raise UserError("usage: vito-fast card DIR... OUT.html")
    write_card(sources, out)
    print(f"card: {out}")
    return 0
