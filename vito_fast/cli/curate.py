"""``vito-fast curate``."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from vito_fast.cli.overrides import Place
from vito_fast.data.store.description import Limits
from vito_fast.errors import UserError


def curate(
    src: Place,
    out: Annotated[Path | None, tyro.conf.Positional] = None,
    root: Path | None = None,
    preset: Literal["videonet", "strict"] = "videonet",
    until: Literal["manifest", "media", "clips", "scores", "decide", "dedup", "balance", "pack"] = "pack",
    engine: Literal["local", "ray"] = "local",
    processes: int = 0,
    part: str = "1/1",
    total: int | None = None,
    target: Path | None = None,
    exclude: Path | None = None,
    near: Literal["drop", "group"] = "group",
    min_length: float | None = None,
    clip_length: float = 10.0,
    hits: int | None = None,
    probability: float | None = None,
    max_per_video: int = 3,
    model: str = "auto",
    weights: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    format: Literal["jpeg", "h264"] = "jpeg",
    seed: int = 0,
    limits: Limits = Limits(),
    estimate: bool = False,
    report: bool = False,
) -> int:
    """Turn a heap of videos into a class-balanced store, with a record of every decision. Safe to kill and to repeat.

    Args:
        src: A folder, whose folders' names are the queries, or a manifest: CSV, JSONL or Parquet.
        out: The folder to write. Left out with --report, which takes SRC for it.
        root: The folder that no path of the manifest may leave; by default the manifest's own.
        preset: videonet (one frame of the first 100 shows the query, clips of 10 s) or strict (two, p >= .2, 1 s).
        until: The last step.
        engine: local (processes of this machine) or ray (the cluster of RAY_ADDRESS).
        processes: Of the local engine, 0 = one per core.
        part: i/n decodes and classifies the i-th of n shares. The same command without it completes the run.
        total: Clips in all; by default the most that fill nine tenths of the target.
        target: A file of lines "class,weight"; by default all classes found weigh the same.
        exclude: A folder of videos and images, as an evaluation set. Clips that show any of them are dropped.
        near: Near-duplicates: drop all but one, or keep a group as one video, which training never contrasts.
        min_length: Seconds; shorter clips are dropped. By default the preset's.
        clip_length: Seconds at which a shot is split.
        hits: Least frames with the query's class on top. By default the preset's.
        probability: Least probability of such a frame. By default the preset's.
        max_per_video: Most clips of one video, 0 = no limit.
        model: Classifier: auto, FILE.onnx, timm:NAME or torchvision:NAME.
        weights: Weight file of a timm or torchvision classifier.
        device: Of the classifier.
        format: Of the store.
        seed: Of the choice among equals.
        limits: Wall time, frames, pixels and memory of one file, after which it is rejected.
        estimate: Estimate the cost of the whole from a sample, and stop.
        report: Write OUT/report.html of a finished run again, and stop.
    """
    import dataclasses

    from vito_fast.cli.progress import StepProgress
    from vito_fast.curate import engine as engines
    from vito_fast.curate import graph
    from vito_fast.curate import report as reports
    from vito_fast.curate.balance import BalanceOptions
    from vito_fast.curate.decide import read_target
    from vito_fast.curate.options import AnalyseOptions, ClassifyOptions, CurateOptions, DecideOptions

    if report:
        print(f"report: {reports.write_report(out or src)}")
        return 0
    if out is None:
        raise UserError("OUT is missing: vito-fast curate SRC OUT")
    try:
        share = tuple(int(text) for text in part.split("/"))
        if len(share) != 2 or not 1 <= share[0] <= share[1]:
            raise ValueError
    except ValueError:
        raise UserError(f"part is {part!r}, must be i/n with 1 <= i <= n, as 2/8") from None
    try:
        usual = DecideOptions.preset(preset)
        decide = dataclasses.replace(
            usual,
            min_length=usual.min_length if min_length is None else min_length,
            hits=usual.hits if hits is None else hits,
            probability=usual.probability if probability is None else probability,
        )
        options = CurateOptions(
            analyse=AnalyseOptions(clip_length=clip_length, limits=limits),
            classify=ClassifyOptions(model, weights, device),
            decide=decide,
            balance=BalanceOptions(total=total, max_per_video=max_per_video, seed=seed),
            near=near,
        )
        wanted = None
        if target is not None:
            if not target.is_file():
                raise UserError(f"no such file: {target}")
            wanted = read_target(target.read_text().splitlines(), str(target))
        with StepProgress() as progress:
            runner = engines.Engine(engine, processes, (share[0], share[1]), progress.update)
            base = root or (src if src.is_dir() else src.parent)
            work = graph.Run(src, out, base.resolve(), options, runner, wanted, exclude, format)
            if estimate:
                lines = graph.estimate(work)
            else:
                summary = graph.curate(work, until, progress.log)
    except ValueError as error:
        raise UserError(str(error)) from None
    if estimate:
        print("\n".join(lines))
        return 0
    print("\n".join(summary.lines()))
    if not summary.complete:
        print(f"curated: part {part} of {out}; the same command without --part completes it")
    elif until == "pack":
        print(f"report: {reports.write_report(out)}")
        print(f"curated: {out / 'store'}" if summary.kept else f"curated: {out} keeps no clip")
    else:
        print(f"curated: {out} up to {until}")
    return 0
