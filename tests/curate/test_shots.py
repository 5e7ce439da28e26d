"""Boundaries of synthetic videos whose shots are known, and of all that is none."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from shot_videos import HEIGHT, WIDTH, make_scene, make_video, texture

from vito_fast.curate import analyse
from vito_fast.curate.options import AnalyseOptions
from vito_fast.data.pack.shots import Cut, ShotDetector

KINDS = ("hard", "dissolve", "fade", "hard", "fade")


def detect(frames) -> list[Cut]:
    detector = ShotDetector()
    found = []
    for number, frame in enumerate(frames):
        new = detector.push(VideoFrame.from_ndarray(frame))
        assert all(number - detector.DELAY <= cut.frame <= number for cut in new)
        found += new
    found += detector.finish()
    assert [cut.frame for cut in found] == sorted({cut.frame for cut in found})
    return found


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (32, 58)])
def test_precision_and_recall_on_videos_with_flashes_strobes_and_whip_pans(size):
    truth = dict.fromkeys(("hard", "dissolve", "fade"), 0)
    hits, found_all = dict(truth), 0
    for seed in range(2002, 2008):
        frames, transitions = make_video(
            np.random.default_rng(seed), KINDS, scenes=lambda rng: make_scene(rng, size=size, whip=rng.random() < 0.2)
        )
        found = detect(frames)
        found_all += len(found)
        for transition in transitions:
            truth[transition.kind] += 1
            slack = 0 if transition.kind == "hard" else 2
            span = range(transition.first - slack, transition.last + slack + 1)
            hits[transition.kind] += any(cut.frame in span for cut in found)
    assert hits["hard"] >= 0.97 * truth["hard"]
    assert hits["fade"] >= 0.9 * truth["fade"]
    assert hits["dissolve"] >= 0.5 * truth["dissolve"]
    assert sum(hits.values()) >= 0.85 * found_all


def test_a_boundary_is_at_the_tick_of_its_frame_under_a_variable_frame_rate(tmp_path):
    rng = np.random.default_rng(5)
    scenes = make_scene(rng, speed=0.5), make_scene(rng, speed=0.5)
    ticks = np.cumsum(rng.integers(3, 40, 70))
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, tick in enumerate(ticks):
            picture = np.clip(scenes[number >= 33](number), 0, 255).astype(np.uint8)
            frame = VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = int(tick), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    row = analyse.run({"root": str(tmp_path), "path": "v.mkv", "id": "v"}, AnalyseOptions())
    assert [(clip["first_frame"], clip["cut"]) for clip in row["clips"]] == [(0, "start"), (33, "cut")]
    assert row["clips"][0]["end"] == row["clips"][1]["start"]
    assert row["time_base"] == "1/1000"
    assert [clip["start"] for clip in row["clips"]] == [ticks[0], ticks[33]]


@pytest.mark.parametrize("seed", range(4))
def test_a_hard_cut_is_exact(seed):
    rng = np.random.default_rng(seed)
    first, second = make_scene(rng, speed=0.5), make_scene(rng, speed=0.5)
    frames = [*map(first, range(30)), *map(second, range(30))]
    found = detect(np.clip(frames, 0, 255).astype(np.uint8))
    assert [(cut.frame, cut.kind) for cut in found] == [(30, "cut")]
    assert found[0].score > 1


def still(seed: int) -> np.ndarray:
    return texture(np.random.default_rng(seed), HEIGHT, WIDTH)


def negatives():
    image = still(1)
    wide = texture(np.random.default_rng(2), HEIGHT, WIDTH * 6)

    def flash(n):
        return image + (180 if 20 <= n < 23 else 0)

    def flicker(n):
        return image * (1 if n % 2 else 0.6)

    def light(n):
        return image * (0.5 if n < 25 else 1.0)

    def blink(n):
        return image * (0 if 20 <= n < 26 else 1)

    def pan(n):
        return wide[:, 8 * n : 8 * n + WIDTH]

    def whip(n):
        at = int(np.interp(n, [20, 30], [0, 120]))
        return wide[:, at : at + WIDTH]

    def grain(n):
        return image + np.random.default_rng(n).normal(0, 25, image.shape)

    return {f.__name__: f for f in (flash, flicker, light, blink, pan, whip, grain)}


@pytest.mark.parametrize("name", ["flash", "flicker", "light", "blink", "pan", "whip", "grain"])
def test_what_is_no_cut(name):
    scene = negatives()[name]
    assert detect(np.clip([scene(n) for n in range(60)], 0, 255).astype(np.uint8)) == []


@pytest.mark.parametrize("level", [0, 255])
def test_a_fade_is_found_at_its_middle(level):
    before, after = still(3), still(4)
    weights = [*np.ones(20), *np.linspace(1, 0, 12), *np.zeros(4), *np.linspace(0, 1, 12), *np.ones(20)]
    frames = [(before if n < 34 else after) * weight + level * (1 - weight) for n, weight in enumerate(weights)]
    (cut,) = detect(np.array(frames, np.uint8))
    assert cut.kind == "fade"
    assert 31 <= cut.frame <= 37


@pytest.mark.parametrize("span", [12, 24, 36])
def test_a_dissolve_is_found_near_its_middle(span):
    before, after = still(5), still(6)
    weights = [*np.zeros(30), *np.linspace(0, 1, span), *np.ones(30)]
    (cut,) = detect(np.array([before * (1 - w) + after * w for w in weights], np.uint8))
    assert cut.kind == "dissolve"
    assert abs(cut.frame - (30 + span / 2)) <= span / 4


def test_a_change_of_size_is_a_cut_and_starts_again():
    frames = [np.full((90, 160, 3), 90, np.uint8)] * 5 + [np.full((120, 90, 3), 90, np.uint8)] * 5
    assert [cut.frame for cut in detect(frames)] == [5]


@pytest.mark.parametrize("shape", [(2, 2), (2, 300), (300, 2), (17, 33)])
def test_any_size_of_picture_is_taken(shape):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (*shape, 3), np.uint8) for _ in range(2)]
    detect(itertools.chain([pictures[0]] * 20, [pictures[1]] * 20))


def test_short_and_empty_videos_have_no_cut():
    assert detect([]) == []
    assert detect([np.zeros((90, 160, 3), np.uint8)]) == []
