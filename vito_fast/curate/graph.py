"""The graph of curation: manifest, media, clips, scores, decide, exclude, dedup, balance, pack.

``OUT`` holds ``candidates.parquet``; a folder of unit files for each of ``media``, ``clips`` and ``scores`` (and
``exclude``); ``groups.parquet`` and ``decisions.parquet``; ``summary.json``; the ``store``; and ``report.html``.
"""

import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vito_fast.curate import analyse, classify, probe
from vito_fast.curate.decide import ORDER, SCHEMA, Ledger, apply_balance, drop_duplicates, judge
from vito_fast.curate.duplicates import (
    ClipHashes,
    Match,
    Membership,
    clip_hashes,
    find_matches,
    searched_side,
    star_groups,
)
from vito_fast.curate.engine import Engine, Item, Step, clean, rows, run, step_key, unit_files
from vito_fast.curate.hashes import VARIANTS
from vito_fast.curate.ids import IdTable, Wanted
from vito_fast.curate.manifest import write_candidates
from vito_fast.curate.options import CurateOptions, digest
from vito_fast.curate.taxonomy import taxonomy
from vito_fast.data.pack import pack
from vito_fast.data.pack.clips import Span
from vito_fast.data.pack.listing import VIDEO_SUFFIXES
from vito_fast.data.store.index import Index
from vito_fast.data.store.labels import write_labels
from vito_fast.data.store.media import BadVideo
from vito_fast.errors import UserError
from vito_fast.files import atomic_write, file_lock

GROUPS = pa.schema(
    [
        ("clip_id", pa.string()),
        ("representative", pa.string()),
        ("distance", pa.int16()),
        ("share", pa.float32()),
        ("variant", pa.string()),
    ]
)


@dataclass
class Summary:
    """What a run made; also ``summary.json``."""

    candidates: int = 0
    files: int = 0
    kept: int = 0
    states: dict[str, int] = field(default_factory=dict)
    """Candidates by terminal step and reason."""
    total: int = 0
    classes: dict[str, list[int]] = field(default_factory=dict)
    """Class number -> clips available, wanted, kept."""
    distance: float | None = None
    optimum: float | None = None
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    complete: bool = True

    def lines(self) -> list[str]:
        result = [f"{self.candidates} candidates, {self.files} files"]
        result += [f"  {count:>7} {reason}" for reason, count in self.states.items()]
        if self.distance is not None:
            result.append(
                f"{self.kept} clips kept of {len(self.classes)} classes; total-variation distance to the target "
                f"{self.distance:.3f}, at best {self.optimum:.3f}"
            )
        return result


@dataclass(slots=True)
class Kept:
    """What later steps need of a kept clip. There may be millions."""

    path: str
    pixels: int
    first_frame: int
    end_frame: int
    start: int
    seconds: float


@dataclass
class Run:
    """One curation: the places, options and engine that its steps share."""

    src: Path
    out: Path
    root: Path
    options: CurateOptions
    engine: Engine
    target: Mapping[int, float] | None = None
    exclude: Path | None = None
    format: str = "jpeg"

    def __post_init__(self) -> None:
        limits, analysis, classifier = self.options.analyse.limits, self.options.analyse, self.options.classify
        wall, memory = limits.seconds, limits.memory_mib
        media_key = step_key("media", probe.VERSION, limits)
        clips_key = step_key("clips", analyse.VERSION, analysis, media_key)
        self.media = Step("media", probe.__name__, limits, media_key, wall, memory)
        self.clips = Step("clips", analyse.__name__, analysis, clips_key, wall, memory)
        self._classifier = classifier
        self._files: dict[str, str] = {}

    def scores(self) -> Step:
        """The step of the classifier, whose key holds the classifier's fingerprint."""
        file = classify.fingerprint(self._classifier)
        key = step_key("scores", classify.VERSION, self._classifier, file, self.clips.key)
        return Step("scores", classify.__name__, self._classifier, key, self.options.analyse.limits.seconds, 0)

    def candidates(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(self.out / "candidates.parquet") as file:
            for batch in file.iter_batches(batch_size=1 << 14, columns=columns):
                yield from batch.to_pylist()

    def name(self, path: str) -> str:
        """The file of a candidate: its real name below the root, so that links and spellings are one file."""
        try:
            return probe.confined(self.root, path).relative_to(self.root).as_posix()
        except BadVideo:
            return path

    def files(self) -> dict[str, str]:
        """The id of each file, by name; it changes with the file."""
        if not self._files:
            for row in self.candidates(["path"]):
                name = self.name(row["path"])
                if name not in self._files:
                    self._files[name] = self._id(name)
        return self._files

    def restrict(self, files: Mapping[str, str]) -> None:
        """Only these files, and their candidates."""
        self._files = dict(files)
        table = pq.read_table(self.out / "candidates.parquet")
        inside = pa.array([self.name(path) in files for path in table["path"].to_pylist()])
        pq.write_table(table.filter(inside), self.out / "candidates.parquet")

    def _id(self, name: str) -> str:
        size, changed = -1, -1
        if "\0" not in name and (self.root / name).is_file():
            status = (self.root / name).stat()
            size, changed = status.st_size, status.st_mtime_ns
        return digest(name, size, changed)

    def decode(self, until: str) -> None:
        """Steps media, clips and scores."""
        items = [Item(i, {"root": str(self.root), "path": name, "id": i}) for name, i in self.files().items()]
        run(self.media, items, self.out / "media", self.engine)
        if until == "media":
            return
        good = self._good(self.out / "media", self.media.key, items)
        run(self.clips, good, self.out / "clips", self.engine)
        if self.exclude:
            run(self.clips, self._excluded(), self.out / "exclude", self.engine)
        if until == "clips":
            return
        run(self.scores(), list(self._to_classify(good)), self.out / "scores", self.engine)

    def _good(self, folder: Path, key: str, items: list[Item]) -> list[Item]:
        ids = {item.id: item for item in items}
        return [ids[row["item_id"]] for row in rows(folder, key, ids, ["status"]) if row["status"] == "ok"]

    def _to_classify(self, good: list[Item]) -> Iterator[Item]:
        ids, seen = {item.id: item for item in good}, set[str]()
        for path, names in unit_files(self.out / "clips", self.clips.key):
            for name in names:
                if name in ids and name not in seen:
                    seen.add(name)
                    data = {"unit": str(path), "id": name, "path": ids[name].data["path"]}
                    yield Item(name, data)

    def _excluded(self) -> list[Item]:
        assert self.exclude
        inside = self.exclude.resolve()
        found = []
        for path in sorted(inside.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES | probe.IMAGES and path.is_file():
                status, name = path.stat(), path.relative_to(inside).as_posix()
                item = digest("exclude", name, status.st_size, status.st_mtime_ns)
                found.append(Item(item, {"root": str(inside), "path": name, "id": item}))
        if not found:
            raise UserError(f"{self.exclude} holds no video or image to exclude")
        return found

    def decide(self) -> tuple[Ledger, dict[str, Kept]]:
        """The ledger after step decide, and the clips that are kept, by id."""
        ledger, kept = Ledger(), dict[str, Kept]()
        wanted = Wanted(self._wanted(ledger))
        self._reject_bad(ledger, wanted)
        for row in self._scored(wanted):
            clips, scores = row["clips"], row["scores"]
            for candidate, classes, pixels in wanted.pop(row["item_id"]):
                if not clips:
                    ledger.reject(candidate, "clips", "holds no clip")
                for clip, seen in zip(clips, scores, strict=True):
                    if ledger.decide(candidate, clip["clip_id"], judge(seen, clip, classes, self.options.decide)):
                        times = (clip["first_frame"], clip["end_frame"], clip["start"], clip["seconds"])
                        kept[clip["clip_id"]] = Kept(row["path"], pixels, *times)
        assert not wanted, f"{len(wanted)} candidates have no state"
        return ledger, kept

    def _wanted(self, ledger: Ledger) -> Iterator[tuple[str, str, list[int]]]:
        for row in self.candidates(["candidate_id", "path", "class_ids", "resolution", "nearest"]):
            if row["resolution"] == "unknown":
                near = f": nearest are {row['nearest']}" if row["nearest"] else ""
                ledger.reject(row["candidate_id"], "manifest", f"unknown query{near}")
            else:
                yield self.files()[self.name(row["path"])], row["candidate_id"], row["class_ids"]

    def _reject_bad(self, ledger: Ledger, wanted: Wanted) -> None:
        """States of the candidates whose file is bad."""
        for step in (self.media, self.clips, self.scores()):
            columns = ["status", "reason", *(["width", "height"] if step is self.media else [])]
            for row in rows(self.out / step.name, step.key, wanted, columns):
                if row["status"] != "ok":
                    for candidate, *_ in wanted.pop(row["item_id"]):
                        ledger.reject(candidate, step.name, row["reason"])
                elif step is self.media:
                    wanted.note(row["item_id"], row["width"] * row["height"])

    def _scored(self, wanted: Wanted) -> Iterator[dict[str, Any]]:
        """Rows of clips and scores together, unit by unit of the clips."""
        units = list(unit_files(self.out / "scores", self.scores().key))
        unit_of = np.repeat(np.arange(len(units)), [len(names) for _, names in units])
        paths, where = [path for path, _ in units], IdTable(name for _, names in units for name in names)
        for path, names in unit_files(self.out / "clips", self.clips.key):
            clips = pq.read_table(path, columns=["item_id", "path", "status", "clips"]).to_pylist()
            scores = {
                row["item_id"]: row["scores"]
                for unit in sorted({unit_of[place] for name in names for place in where.find(name)})
                for row in pq.read_table(paths[unit], columns=["item_id", "scores"]).to_pylist()
            }
            for row in clips:
                if row["status"] == "ok" and row["item_id"] in wanted:
                    yield {**row, "scores": scores[row["item_id"]]}

    def duplicates(self, ledger: Ledger, kept: Mapping[str, Kept]) -> tuple[list[str], list[Membership]]:
        """Steps exclude and dedup. Returns the clips in the order of their numbers, and the star of each."""
        options = self.options.duplicates

        def best(clip: str) -> tuple[int, float, str]:
            return -kept[clip].pixels, -(ledger.state(clip).value or 0.0), clip

        order = sorted(kept, key=best)
        numbers = {clip: number for number, clip in enumerate(order)}
        outside: dict[str, int] = {}
        if self.exclude:
            for row in self._hashed("exclude", {item.id: None for item in self._excluded()}):
                for clip in row["clips"]:
                    outside[clip["clip_id"]] = len(order) + len(outside)
        matches = self._matches(numbers, outside) if order else []
        found: dict[int, Match] = {}
        for match in matches:
            inner, outer = sorted((match.clip, match.other))
            if inner < len(order) <= outer and (inner not in found or match.distance < found[inner].distance):
                found[inner] = match
        for number, match in sorted(found.items()):
            distance, most = float(match.distance), float(options.distance)
            ledger.drop(order[number], "exclude", "shown in the excluded set", distance, most)
        inside = [m for m in matches if max(m.clip, m.other) < len(order) and not {m.clip, m.other} & found.keys()]
        groups = star_groups(len(order), inside)
        if self.options.near == "drop":
            drop_duplicates(ledger, order, groups, options.distance)
        table = (_group(order, number, group) for number, group in enumerate(groups) if number not in found)
        _write_table(self.out / "groups.parquet", table, GROUPS)
        return order, groups

    def _hashed(self, folder: str, ids: Container[str]) -> Iterator[dict[str, Any]]:
        return rows(self.out / folder, self.clips.key, ids, ["clips", "hashes"])

    def _matches(self, numbers: Mapping[str, int], outside: Mapping[str, int]) -> list[Match]:
        files = frozenset(self.files().values())
        excluded = {item.id: None for item in self._excluded()} if outside else {}

        def batches() -> Iterator[ClipHashes]:
            for folder, ids, known in (("clips", files, numbers), ("exclude", excluded, outside)):
                for row in self._hashed(folder, ids) if known else ():
                    for clip, hashes in zip(row["clips"], row["hashes"], strict=True):
                        if clip["clip_id"] in known:
                            yield clip_hashes(known[clip["clip_id"]], hashes, self.options.duplicates.contrast)

        searched, sizes = searched_side(batches, len(numbers) + len(outside))
        return find_matches(searched, batches, sizes, self.options.duplicates)

    def balance(self, ledger: Ledger, kept: Mapping[str, Kept], summary: Summary) -> None:
        found = apply_balance(ledger, {clip: kept[clip].path for clip in kept}, self.target, self.options)
        summary.total, summary.distance, summary.optimum = found.total, found.distance, found.optimum
        for label, wanted in found.wanted.items():
            summary.classes[str(label)] = [found.available.get(label, 0), wanted, found.counts[label]]

    def pack(self, ledger: Ledger, kept: Mapping[str, Kept], groups: Mapping[str, str]) -> None:
        """The store of the kept clips; a file that packing rejects takes its clips' states along."""
        spans: dict[str, list[tuple[Span, str]]] = {}
        for clip in ledger.kept:
            values = kept[clip]
            span = Span(values.first_frame, values.end_frame, values.start, group=groups.get(clip, ""))
            spans.setdefault(values.path, []).append((span, clip))
        for path, own in spans.items():
            own.sort(key=lambda pair: pair[0].first_frame)
            spans[path] = [(dataclasses.replace(span, line=n), clip) for n, (span, clip) in enumerate(own, 1)]
        store, seal = self.out / "store", self.out / "store.key"
        key = digest(self.format, sorted((name, [asdict(span) for span, _ in own]) for name, own in spans.items()))
        if store.exists() and (not seal.exists() or seal.read_text() != key):
            shutil.rmtree(store)
        if not spans:
            return
        seal.write_text(key)
        limits = self.options.analyse.limits
        pack(
            self.root, store, format=self.format, limits=limits, processes=self.engine.processes, progress=False,
            clips={name: [span for span, _ in own] for name, own in spans.items()},
        )  # fmt: skip
        for line in (store / "quarantine.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if entry["state"] == "rejected":
                _, clip = spans[entry["file"]][entry["line"] - 1]
                ledger.drop(clip, "pack", entry["reason"], None, None)
        packed = {path: [pair for pair in own if pair[1] in ledger.kept] for path, own in spans.items()}
        self._label(store, ledger, packed)

    def _label(self, store: Path, ledger: Ledger, spans: Mapping[str, list[tuple[Span, str]]]) -> None:
        """``labels.parquet``: a row a clip of the store, in its order."""
        index, order = Index(store / "index.bin"), {name: iter(own) for name, own in spans.items()}
        columns = ["candidate_id", "query", "title", "tags", "licence", "source"]
        provenance = {row["candidate_id"]: row for row in self.candidates(columns)}
        found = []
        for number in range(len(index)):
            info = index.clip(number)
            span, clip = next(order[info.source])
            state, row = ledger.state(clip), provenance[ledger.candidate(clip)]
            found.append({
                "clip": number, "clip_id": clip, "label": state.label, "class": taxonomy().classes[state.label].name,
                "score": state.value, "group": span.group, "video": info.video, "path": info.source,
                "first_frame": span.first_frame, "end_frame": span.end_frame, "start": span.start, **row,
            })  # fmt: skip
        if any(next(rest, None) for rest in order.values()):
            raise RuntimeError(f"{store} lacks clips of its list")
        write_labels(store, found)


def _group(order: list[str], number: int, group: Membership) -> dict[str, Any]:
    match = group.match
    return {
        "clip_id": order[number], "representative": order[group.representative],
        "distance": match.distance if match else 0, "share": match.share if match else 1.0,
        "variant": VARIANTS[match.variant] if match else "plain",
    }  # fmt: skip


def _write_table(path: Path, found: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """In batches, so that a table larger than memory can be written."""
    left = iter(found)
    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        while batch := list(itertools.islice(left, 1 << 14)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def group_names(order: list[str], groups: list[Membership], kept: Container[str]) -> dict[str, str]:
    """The group of each kept clip that has a companion: the representative's id."""
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        if order[number] in kept:
            members.setdefault(group.representative, []).append(number)
    return {order[n]: order[star] for star, own in members.items() if len(own) > 1 for n in own}


def curate(work: Run, until: str = "pack", log: Callable[[str], None] = lambda line: None) -> Summary:
    """Run the graph up to a step. Safe to kill at any time and to repeat; finished units are reused.

    Args:
        work: Places, options and engine. With ``engine.part`` of several, only that part's units are computed; the
            same command without part then completes the run.
        until: The last step.
        log: Gets a line when a step begins.

    Raises:
        UserError: The manifest, folders or packages are not usable, or another process works on ``OUT``.
    """
    if until not in ORDER:
        raise ValueError(f"until is {until!r}, must be one of {', '.join(ORDER)}")
    work.out.mkdir(parents=True, exist_ok=True)
    part = "" if work.engine.part == (1, 1) else f"-{work.engine.part[0]}"
    with file_lock(work.out / f".lock{part}") as held:
        if not held:
            raise UserError(f"another process curates into {work.out}; wait for it or stop it")
        return _curate(work, until, log)


def _curate(work: Run, until: str, log: Callable[[str], None]) -> Summary:
    summary, place = Summary(), ORDER.index(until)
    write_candidates(work.src, work.out / "candidates.parquet")
    if place > 0:
        work.decode(until)
    whole = work.engine.part == (1, 1)
    summary.candidates = sum(1 for _ in work.candidates(["row"]))
    summary.files = len(work.files())
    if place >= ORDER.index("decide") and whole:
        ledger, kept = work.decide()
        groups: dict[str, str] = {}
        if place >= ORDER.index("exclude"):
            log("dedup")
            order, stars = work.duplicates(ledger, kept)
            if place >= ORDER.index("balance"):
                work.balance(ledger, kept, summary)
            groups = group_names(order, stars, ledger.kept)
        if place >= ORDER.index("pack"):
            log("pack")
            work.pack(ledger, kept, groups)
        _write_table(work.out / "decisions.parquet", ledger.rows(), SCHEMA)
        summary.kept = len(ledger.kept)
        for row in ledger.rows():
            if row["clip_id"] is None:
                reason = row["reason"].partition(":")[0].partition(" of ")[0]
                name = row["verdict"] if row["verdict"] == "kept" else f"{row['step']}: {reason}"
                summary.states[name] = summary.states.get(name, 0) + 1
    summary.complete = whole
    summary.costs = {name: asdict(cost) for name, cost in work.engine.costs.items()}
    if whole:
        clean(work.out / "media", work.media.key)
        if place >= ORDER.index("clips"):
            clean(work.out / "clips", work.clips.key)
            clean(work.out / "exclude", work.clips.key)
        if place >= ORDER.index("scores"):
            clean(work.out / "scores", work.scores().key)
        with atomic_write(work.out / "summary.json") as partial:
            partial.write_text(json.dumps(asdict(summary), indent=1))
    return summary


SAMPLE = 16
"""Files that an estimate decodes."""


def estimate(work: Run) -> list[str]:
    """What the whole will cost, from a sample of the files that depends on their ids only."""
    folder = work.out / ".estimate"
    begin = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sample = dataclasses.replace(work, out=folder)
        write_candidates(work.src, folder / "candidates.parquet")
        files = sample.files()
        chosen = dict(sorted(files.items(), key=lambda pair: digest(pair[1]))[:SAMPLE])
        sizes = {name: (work.root / name).stat().st_size for name in files if (work.root / name).is_file()}
        sample.restrict(chosen)
        sample.decode("scores")
        _, kept = sample.decide()
        seconds = sum(cost.cpu_s for cost in work.engine.costs.values())
        disk = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        scale = sum(sizes.values()) / max(1, sum(sizes.get(name, 0) for name in chosen))
        share = len({values.path for values in kept.values()}) / max(1, len(chosen))
        stored = sum(values.seconds for values in kept.values()) * scale
        return [
            f"{len(files)} files, {sum(sizes.values()) / 1e9:.3f} GB; {len(chosen)} decoded "
            f"in {time.monotonic() - begin:.0f} s",
            f"whole: about {seconds * scale / 3600:.2f} core hours, {disk * scale / 1e9:.3f} GB of tables",
            f"kept: about {share:.0%} of the files, {stored / 3600:.2f} hours of clips before dedup and balance",
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
