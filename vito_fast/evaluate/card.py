"""The card: one self-contained HTML page that sets encoders side by side, with the paper and the baselines.

All text is escaped, pictures are embedded, and nothing is fetched. The page says where an encoder does not beat a
baseline, what was not run and why, and where each number comes from.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from PIL import Image

from vito_fast.errors import UserError
from vito_fast.evaluate import run
from vito_fast.evaluate.result import Encoded, Metric, Result, is_result, load
from vito_fast.evaluate.task import TASKS, Task, find_task
from vito_fast.files import atomic_write, check_writable

Found = list[tuple[Path, Result]]
MOST_BARS = 16
"""Rows of a bar chart that are open at first; more are folded."""


def write_card(folders: Sequence[Path], out: Path) -> None:
    """Writes the page of all complete results under some folders.

    Raises:
        UserError: without any result, or if the page cannot be written.
    """
    check_writable(out)
    found = [(path, load(path)) for folder in folders for path in sorted(folder.rglob("*.json")) if is_result(path)]
    found = [(path, result) for path, result in found if result.complete]
    if not found:
        names = ", ".join(map(str, folders))
        raise UserError(f"{names} holds no result: run vito-fast evaluate ENCODER --tasks ... --out DIR first")
    encoders = _encoders(found)
    tasks = [name for name in TASKS if any(result.task == name for _, result in found)]
    body = [
        "<h1>Encoder card</h1>",
        f"<p class=soft>{escape(', '.join(e.name for e in encoders))}. Values are means ± standard errors.</p>",
        _table(found, encoders, tasks),
        _verdicts(found, encoders),
        *(_task(name, [f for f in found if f[1].task == name], encoders) for name in tasks),
        _not_run(folders, found),
        _provenance(found, encoders),
    ]
    style = resources.files("vito_fast.evaluate").joinpath("card.css").read_text(encoding="utf-8")
    page = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Encoder card</title><style>{style}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    with atomic_write(out) as partial:
        partial.write_text(page, encoding="utf-8")


def is_baseline(encoder: Encoded) -> bool:
    """Whether an encoder is one of the baselines that have names of their own."""
    return encoder.source.split(":")[0] in ("random", "pixels", "imagenet")


def _encoders(found: Found) -> list[Encoded]:
    """Each encoder once: those under evaluation, then random, pixels and the ImageNet reference."""
    once = {result.encoder.sha256: result.encoder for _, result in found}
    order = ("random", "pixels", "imagenet")

    def place(encoder: Encoded) -> int:
        return 1 + order.index(encoder.source.split(":")[0]) if is_baseline(encoder) else 0

    return sorted(once.values(), key=place)


def _of(found: Found, task: str, encoder: Encoded) -> Result | None:
    """The newest result of a task and encoder that the table shows."""
    matching = [result for _, result in found if result.task == task and result.encoder.sha256 == encoder.sha256]
    return matching[-1] if matching else None


def _table(found: Found, encoders: list[Encoded], tasks: list[str]) -> str:
    head = "".join(f"<th>{escape(e.name)}<small>{escape(_short(e))}</small></th>" for e in encoders)
    ours = sum(not is_baseline(e) for e in encoders)
    columns = head.split("</th>")
    head = "</th>".join([*columns[:ours], "<th>the paper's", *columns[ours:]])
    rows = []
    for task in tasks:
        results = [_of(found, task, encoder) for encoder in encoders]
        first = next(r for r in results if r is not None)
        name, _ = first.primary
        values = [r.metrics[name].value if r and name in r.metrics else None for r in results]
        best = max((v for v in values if v is not None), default=None)
        prior = first.metrics.get("center_prior")
        if prior and prior.value is not None and best is not None and prior.value >= best:
            best = None  # no encoder is best where the center prior beats them all
        cells = [_cell(r.metrics.get(name) if r else None, best) for r in results]
        cells.insert(ours, _published(first, name))
        title = f"{escape(find_task(task).title)}<small>{escape(name)}, preset {escape(first.preset)}</small>"
        title += f"<small>center prior {run.number(prior.value, prior.standard_error)}</small>" if prior else ""
        rows.append(f"<tr><th>{title}</th>{''.join(cells)}</tr>")
    return _grid(f"<tr><th>task</th>{head}</tr>", "".join(rows))


def _grid(head: str, rows: str) -> str:
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def _short(encoder: Encoded) -> str:
    step = f", step {encoder.step:,}" if encoder.step is not None else ""
    return f"{encoder.architecture}; {encoder.init}{step}"


def _cell(metric: Metric | None, best: float | None) -> str:
    if metric is None or metric.value is None:
        return "<td class=soft>not run</td>"
    mark = " class='num best'" if metric.value == best else " class=num"
    return f"<td{mark}>{escape(run.number(metric.value, metric.standard_error))}<small>n = {metric.n:,}</small></td>"


def _published(result: Result, metric: str) -> str:
    lines = []
    for figure in result.published:
        if figure["metric"] == metric:
            changed = result.preset.endswith("*")
            same = "yes" if figure["same_protocol"] and not changed else "no"
            because = "options were changed" if changed and figure["same_protocol"] else figure["because"]
            lines.append(
                f"{figure['value']:.3f}<small>{escape(figure['source'])}<br>"
                f"same protocol: {same}, because: {escape(because)}</small>"
            )
    return f"<td>{lines[0] if lines else '<span class=soft>none published</span>'}</td>"


def _verdicts(found: Found, encoders: list[Encoded]) -> str:
    results = [result for _, result in found]
    lines = []
    for ours in (e for e in encoders if not is_baseline(e)):
        for one in (r for r in results if r.encoder.sha256 == ours.sha256):
            for other in results:
                same = other.task == one.task and other.key["preset"] == one.key["preset"]
                if same and other.key["data"] == one.key["data"] and is_baseline(other.encoder):
                    text = run.comparison_line(other, one)
                    kind = "bad" if text and "NOT" in text else "soft" if text and "no difference" in text else "good"
                    lines += [f"<li class={kind}>{escape(text)}</li>"] if text else []
    if not lines:
        return ""
    note = "Paired over items, 95 % intervals by Student's t; of mIoU and AP by a bootstrap over images."
    return f"<h2>Against the baselines</h2><p class=soft>{note}</p><ul>{''.join(lines)}</ul>"


def _task(name: str, found: Found, encoders: list[Encoded]) -> str:
    task: Task = find_task(name)
    present = [e for e in encoders if _of(found, name, e)]
    parts = [f"<h2 id={escape(name)}>{escape(task.title)}</h2>"]
    notes = dict.fromkeys(note for _, result in found for note in result.notes)
    parts.append("".join(f"<p class=soft>{escape(note)}</p>" for note in notes))
    parts.append(_metrics(found, present))
    parts.append(_bars(found, present, name))
    parts += [_pictures(path, result) for path, result in found if result.media]
    return "".join(parts)


def _metrics(found: Found, encoders: list[Encoded]) -> str:
    results = {e.sha256: _of(found, found[0][1].task, e) for e in encoders}
    names = dict.fromkeys(name for r in results.values() if r for name in r.metrics)
    if len(names) < 2:
        return ""
    head = "".join(f"<th>{escape(e.name)}</th>" for e in encoders)
    rows = ""
    for name in names:
        metrics = [r.metrics.get(name) if (r := results[e.sha256]) else None for e in encoders]
        cells = "".join(
            f"<td class=num>{escape(run.number(m.value, m.standard_error)) if m else '—'}</td>" for m in metrics
        )
        rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return _grid(f"<tr><th></th>{head}</tr>", rows)


def _bars(found: Found, encoders: list[Encoded], task: str) -> str:
    """Scores of each class or sequence, a bar an encoder; nothing for tasks with hundreds of items and no groups."""
    results = [(e, r) for e in encoders if (r := _of(found, task, e))]
    tables = [r.groups or (r.items if len(r.items) <= 60 else {}) for _, r in results]
    names = list(dict.fromkeys(name for table in tables for name, scores in table.items() if scores))
    if not names or len(names) > 1300:
        return ""
    metric = next(iter(next(t[n] for n in names for t in tables if n in t)))
    colors = [f"var(--c{encoders.index(e) % 6})" for e, _ in results]
    key = "".join(
        f"<span><svg viewBox='0 0 1 1'><rect width=1 height=1 style='fill:{color}'/></svg> {escape(e.name)}</span>"
        for (e, _), color in zip(results, colors, strict=True)
    )
    rows = []
    for name in names:
        values = [table.get(name, {}).get(metric) for table in tables]
        rows.append(f"<span title='{escape(name)}'>{escape(name)}</span>{_bar(values, colors)}")
    first, more = "".join(rows[:MOST_BARS]), "".join(rows[MOST_BARS:])
    folded = f"<details><summary>{len(rows) - MOST_BARS} more</summary><div class=bars>{more}</div></details>"
    heading = f"<h3>{escape(metric)} by {'group' if results[0][1].groups else 'item'}, 0 to 1</h3>"
    return f"{heading}<div class=key>{key}</div><div class=bars>{first}</div>{folded if more else ''}"


def _bar(values: Iterable[float | None], colors: list[str]) -> str:
    bars, height = [], 5
    shown = list(values)
    for place, (value, color) in enumerate(zip(shown, colors, strict=True)):
        if value is not None:
            width = max(0.3, 100 * min(1.0, max(0.0, value)))
            at = place * (height + 1)
            title = f"<title>{value:.3f}</title>"
            bars.append(f"<rect y={at} width={width:.1f} height={height} style='fill:{color}'>{title}</rect>")
    total = len(shown) * (height + 1)
    box = f"viewBox='0 0 100 {total}' preserveAspectRatio=none height={total}"
    return f"<svg {box} role=img>{''.join(bars)}</svg>"


def _pictures(path: Path, result: Result) -> str:
    figures = []
    for caption, name in result.media.items():
        file = path.with_suffix("") / Path(name).name
        try:
            with Image.open(file) as image:
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "JPEG", quality=82)
        except OSError:
            continue  # a folder that was copied without its pictures still has its numbers
        data = base64.b64encode(buffer.getvalue()).decode()
        text = escape(caption)
        figures.append(
            f"<figure><img alt='{text}' src='data:image/jpeg;base64,{data}'><figcaption>{text}</figcaption></figure>"
        )
    if not figures:
        return ""
    return f"<h3>{escape(result.encoder.name)}</h3><div class=pictures>{''.join(figures)}</div>"


def _not_run(folders: Sequence[Path], found: Found) -> str:
    lines = []
    for record in (record for folder in folders for record in run.not_run(folder)):
        what = f"{record['task']}, {record['encoder']}: {record['why']}"
        lines.append(f"<li>{escape(what)}<br><code>{escape(str(record['command']))}</code></li>")
    source = next((r.encoder.source for _, r in found if not is_baseline(r.encoder)), "ENCODER")
    for name in TASKS:
        if all(result.task != name for _, result in found):
            command = f"vito-fast evaluate {source} --tasks {name} --data.{name} PATH --out DIR"
            why = f"{name}: no data was given; docs/evaluate/{name}.md says where to get it"
            lines.append(f"<li>{escape(why)}<br><code>{escape(command)}</code></li>")
    return f"<h2>Not run</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _provenance(found: Found, encoders: list[Encoded]) -> str:
    parts = ["<h2>Provenance</h2>"]
    rows = "".join(
        f"<tr><th>{escape(e.name)}</th><td><code>{escape(e.source)}</code></td><td>{escape(_short(e))}"
        f"<small>{escape('; '.join(e.notes))}</small></td><td><code>{e.sha256[:16]}</code></td></tr>"
        for e in encoders
    )
    head = "<tr><th>encoder</th><th>source</th><th>weights</th><th>sha256</th></tr>"
    parts.append(_grid(head, rows))
    shown: set[tuple[str, str]] = set()
    for _, result in found:
        if (result.task, result.key["preset"]) in shown:
            continue
        shown.add((result.task, result.key["preset"]))
        options = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td>"
            f"<td>{escape(result.provenance.get(name, ''))}</td></tr>"
            for name, value in result.options.items()
        )
        data = result.data
        size = f"{data.get('files')} files, {data.get('bytes')} bytes"
        where = f"{data.get('path')}: {size}, sha256 {str(data.get('sha256'))[:16]}"
        machine, cost = result.environment, result.cost
        cpu = f"{cost.get('wall_seconds', 0):.0f} s of {machine.get('device_name')}, {machine.get('threads')} threads"
        versions = ", ".join(f"{k} {v}" for k, v in machine.get("packages", {}).items() if v)
        parts.append(
            f"<details><summary>{escape(result.task)}, preset {escape(result.preset)}</summary>"
            f"<p><code>{escape(where)}</code></p><p class=soft>{escape(cpu)}; {escape(versions)}</p>"
            f"{_grid('<tr><th>option</th><th>value</th><th>from</th></tr>', options)}</details>"
        )
    return "".join(parts)
