"""Decisions, the law of conservation, and the manifest's ways in."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vito_fast.curate.decide import Ledger, State, apply_balance, judge, read_target
from vito_fast.curate.ids import IdTable, Wanted
from vito_fast.curate.manifest import clean, write_candidates
from vito_fast.curate.options import CurateOptions, DecideOptions, digest
from vito_fast.errors import UserError

CLIP = {"seconds": 10.0, "flat_share": 0.0}


def frames(*best: tuple[int, float]) -> list[dict]:
    return [{"ids": [label, 999], "probabilities": [p, 0.0]} for label, p in best]


def test_videonet_needs_one_hit_in_ten_seconds():
    options = DecideOptions.preset("videonet")
    seen = frames((7, 0.1), (207, 0.05), (8, 0.9))
    state = judge(seen, CLIP, [207, 208], options)
    assert (state.verdict, state.label, state.value) == ("kept", 207, pytest.approx(0.05))
    assert judge(seen, CLIP, [3], options).reason == "its query is not seen"
    short = judge(seen, {**CLIP, "seconds": 9.9}, [207], options)
    assert (short.reason, short.value, short.threshold) == ("too short", 9.9, 10.0)
    assert judge(seen, {**CLIP, "flat_share": 0.9}, [207], options).reason == "flat"


def test_strict_needs_two_frames_of_a_fifth():
    options, clip = DecideOptions.preset("strict"), {**CLIP, "seconds": 1.0}
    assert judge(frames((207, 0.2), (207, 0.19)), clip, [207], options).reason == "its query is seen too seldom"
    assert judge(frames((207, 0.2), (208, 0.4)), clip, [207, 208], options).label == 208


def test_without_a_query_a_class_must_prevail():
    options = DecideOptions.preset("strict")
    assert judge(frames((5, 0.9), (5, 0.5), (6, 0.9)), CLIP, [], options).label == 5
    assert judge(frames((5, 0.9), (6, 0.5), (7, 0.9)), CLIP, [], options).reason == "no class prevails"
    assert judge(frames((5, 0.2), (5, 0.2)), CLIP, [], options).verdict == "rejected"
    assert judge([], CLIP, [], options).verdict == "rejected"


CANDIDATES = st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_candidate_and_clip_ends_in_one_state(data):
    """Several candidates share files; clips are kept, rejected, dropped and balanced at random."""
    ledger, expected = Ledger(), set()
    for number, owners in enumerate(data.draw(st.lists(CANDIDATES, max_size=4))):
        for clip in (f"{number}-{n}" for n in range(data.draw(st.integers(1, 3)))):
            for owner in owners:
                kept = data.draw(st.booleans())
                score = data.draw(st.sampled_from([0.2, 0.5]))
                ledger.decide(
                    owner, clip, State("decide", "kept" if kept else "rejected", "", 3 if kept else -1, score)
                )
                expected.add((owner, clip))
    for owner in set("abcd") - {owner for owner, _ in expected}:
        ledger.reject(owner, "media", "bad")
    for clip in list(ledger.kept)[::3]:
        ledger.drop(clip, "dedup", "near", 3.0, 72.0)
    videos = {clip: clip.partition("-")[0] for clip in ledger.kept}
    apply_balance(ledger, videos, None, CurateOptions())
    rows = list(ledger.rows())
    assert {(row["candidate_id"], row["clip_id"]) for row in rows if row["clip_id"]} == expected
    assert [row["candidate_id"] for row in rows if row["clip_id"] is None] == sorted("abcd")
    kept = [row["clip_id"] for row in rows if row["clip_id"] and row["verdict"] == "kept"]
    assert sorted(kept) == sorted(ledger.kept)
    assert all(row["reason"] or row["verdict"] == "kept" or row["step"] == "decide" for row in rows)


def test_candidates_of_a_file_are_wanted_until_they_are_popped():
    ids = [digest(n) for n in range(6)]
    rows = [(ids[n % 3], digest("candidate", n), [n % 2, 7]) for n in range(7)]
    wanted = Wanted(rows)
    wanted.note(ids[1], 99)
    assert len(wanted) == 7
    assert ids[0] in wanted
    assert ids[3] not in wanted
    assert wanted.pop(ids[1]) == [(rows[1][1], (1, 7), 99), (rows[4][1], (0, 7), 99)]
    assert ids[1] not in wanted
    assert wanted.pop(ids[1]) == wanted.pop(ids[3]) == []
    assert len(wanted) == 5
    assert len(Wanted([])) == 0
    table = IdTable([ids[2], ids[0], ids[2]])
    assert (table.find(ids[2]), table.find(ids[0]), table.find(ids[5])) == ([0, 2], [1], [])


def test_a_candidate_has_the_reason_of_the_clip_that_came_furthest():
    """Not that of a rest of three seconds, though 3 is more than no hit."""
    ledger = Ledger()
    ledger.decide("a", "x", State("decide", "rejected", "its query is not seen", value=0.0))
    ledger.decide("a", "y", State("decide", "rejected", "too short", value=3.0))
    assert [row["reason"] for row in ledger.rows()] == ["its query is not seen"] * 2 + ["too short"]


def test_two_states_of_a_candidate_are_refused():
    ledger = Ledger()
    ledger.decide("a", "x", State("decide", "rejected", "flat"))
    ledger.reject("a", "media", "bad")
    with pytest.raises(AssertionError, match="two states of a"):
        list(ledger.rows())


def test_a_target_file_resolves_queries():
    target = read_target(["class,weight", "tench,2", "domestic cat,1"], "t.csv")
    assert target[0] == 2
    assert sum(target.values()) == pytest.approx(3)
    assert len(target) == 6
    for bad in ("nonsenseword,1", "tench,x", "tench"):
        with pytest.raises(ValueError, match="line 1"):
            read_target([bad], "t.csv")


def candidates(path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_all_kinds_of_manifest_are_the_same_candidates(tmp_path):
    rows = [
        {"path": "a,b.mp4", "query": "tench", "title": "A <b>fish</b>\n\x07"},
        {"path": "c.mp4", "query": "", "title": ""},
        {"path": "c.mp4", "query": "dgo", "title": ""},
    ]
    (tmp_path / "m.csv").write_text('path,query,title\n"a,b.mp4",tench,"A <b>fish</b>\n\x07"\nc.mp4,,\nc.mp4,dgo,\n')
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    found = []
    for kind in ("csv", "jsonl", "parquet"):
        assert write_candidates(tmp_path / f"m.{kind}", tmp_path / "out") == tmp_path
        found.append(candidates(tmp_path / "out"))
    assert found[0] == found[1] == found[2]
    assert [row["resolution"] for row in found[0]] == ["exact", "none", "unknown"]
    assert found[0][0]["title"] == "A <b>fish</b>\\n\\x07"
    assert "dog" in found[0][2]["nearest"]


def test_a_folder_names_its_queries(tmp_path):
    for name in ("x.mp4", "tench/x.mp4", "tench/notes.txt", "dogs/deep/y.webm", "qqq/z.mp4"):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).touch()
    write_candidates(tmp_path / "v", tmp_path / "out")
    shown = {row["path"]: row["query"] for row in candidates(tmp_path / "out")}
    assert shown == {"x.mp4": "", "tench/x.mp4": "tench", "dogs/deep/y.webm": "dogs", "qqq/z.mp4": "qqq"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "file,query\na,b\n", "row 1 has no path"),
        ("m.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("m.jsonl", '{"path": 3}\n', "row 1 has no path"),
        ("m.parquet", "nothing", "no Parquet file"),
        ("m.txt", "a", "no manifest"),
        ("m.csv", "path,query\n", "holds no candidate"),
    ],
)
def test_a_bad_manifest_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        write_candidates(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_row_twice_is_one_candidate(tmp_path):
    (tmp_path / "m.csv").write_text("path,query\na.mp4,dog\na.mp4,dog\na.mp4,cat\n")
    write_candidates(tmp_path / "m.csv", tmp_path / "out")
    assert [row["query"] for row in candidates(tmp_path / "out")] == ["dog", "cat"]


def test_fields_are_bounded_and_visible():
    assert clean("a\x00b\u202ec") == "a\\x00b\\u202ec"
    assert len(clean("x" * 10000)) == 4096
    assert clean("../a\x00", keep=True) == "../a\x00"
