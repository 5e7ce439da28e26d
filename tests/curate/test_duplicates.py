"""Altered copies are found, different pictures are not; groups are stars in a fixed order."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from shot_videos import texture

from vito_fast.curate.duplicates import (
    ClipHashes,
    DuplicateOptions,
    Match,
    as_words,
    distances,
    find_matches,
    searched_side,
    star_groups,
)
from vito_fast.curate.hashes import BYTES, SEARCHED, VARIANTS, frame_hashes, strip_bars

BASES, WIDTH, HEIGHT = 25, 320, 180


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=12)
    return Image.open(buffer).convert("RGB")


def crop(image, keep):
    dx, dy = WIDTH * (1 - keep) / 2, HEIGHT * (1 - keep) / 2
    return image.crop((round(dx), round(dy), round(WIDTH - dx), round(HEIGHT - dy)))


def framed(image, dx, dy, color=(0, 0, 0)):
    result = Image.new("RGB", (WIDTH + 2 * dx, HEIGHT + 2 * dy), color)
    result.paste(image, (dx, dy))
    return result


def noisy(image):
    noise = np.random.default_rng(0).normal(0, 20, (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def written(image, xy, size, box=None):
    image = image.copy()
    draw = ImageDraw.Draw(image)
    if box:
        draw.rectangle(box, fill=(0, 0, 0))
    draw.text(xy, "a line of text", fill=(255, 255, 255), font_size=size)
    return image


def captioned(image):
    taller = Image.new("RGB", (WIDTH, HEIGHT + 30))
    taller.paste(image, (0, 0))
    return written(taller, (80, HEIGHT + 6), 18)


ALTERATIONS = {
    "jpeg": jpeg,
    "small": lambda image: image.resize((112, 64)),
    "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.5),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "noise": noisy,
    "letterbox": lambda image: framed(image, 0, 30),
    "pillarbox": lambda image: framed(image, 45, 0),
    "white frame": lambda image: framed(image, 20, 20, (255, 255, 255)),
    "mirror": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "caption bar": captioned,
    "subtitle": lambda image: written(image, (70, 150), 20),
    "crop 10 %": lambda image: crop(image, 0.9),
    "crop 20 %": lambda image: crop(image, 0.8),
    "stretch": lambda image: image.resize((240, 180)),
}


def gray(image: Image.Image) -> np.ndarray:
    scale = 96 / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX))


def picture(seed: int) -> Image.Image:
    image = Image.fromarray(texture(np.random.default_rng(seed), HEIGHT, WIDTH).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1))


@pytest.fixture(scope="module")
def originals():
    return [frame_hashes(gray(picture(seed)))[0] for seed in range(BASES)]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """Bits between two frames, searched in either direction."""
    a, b = as_words(a), as_words(b)
    return int(min(distances(a[:, None], b[None, :SEARCHED]).min(), distances(b[:, None], a[None, :SEARCHED]).min()))


@pytest.mark.parametrize("name", ALTERATIONS)
def test_altered_copies_are_near_and_other_pictures_far(originals, name):
    most = DuplicateOptions().distance
    altered = [frame_hashes(gray(ALTERATIONS[name](picture(seed))))[0] for seed in range(0, BASES, 3)]
    for place, hashes in enumerate(altered):
        for seed, other in enumerate(originals):
            assert (apart(hashes, other) <= most) == (seed == 3 * place), (seed, place, apart(hashes, other))


@pytest.mark.parametrize("keep", [0.96, 0.925, 0.875, 0.83, 0.78, 0.72])
def test_crops_between_the_insets_are_found(originals, keep):
    for seed in range(0, BASES, 4):
        assert apart(frame_hashes(gray(crop(picture(seed), keep)))[0], originals[seed]) <= 60


def test_bars_are_stripped_to_the_pixel():
    inside = np.random.default_rng(0).integers(0, 255, (60, 100), np.uint8)
    framed = np.pad(inside, ((10, 20), (7, 3)), constant_values=16)
    assert strip_bars(framed) == (10, 70, 7, 107)
    assert strip_bars(inside) == (0, 60, 0, 100)
    assert strip_bars(np.full((60, 100), 3, np.uint8)) == (0, 60, 0, 100)


def test_the_mirror_variant_is_the_hash_of_the_mirrored_frame():
    frame = gray(picture(1))
    here, there = frame_hashes(frame)[0], frame_hashes(np.ascontiguousarray(frame[:, ::-1]))[0]
    mirror = VARIANTS.index("mirror")
    assert int(distances(as_words(here[mirror : mirror + 1]), as_words(there[:1]))[0]) <= 2


def simulated(clips: int, frames: int, copies: float, flips: int, seed: int = 0) -> tuple[ClipHashes, np.ndarray]:
    """Random hashes; a share of the clips are copies of earlier ones with ``flips`` bits turned. -1 is no copy."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (clips, frames, BYTES), np.uint8)
    of = np.full(clips, -1)
    fresh = int(clips * (1 - copies))
    of[fresh:] = rng.permutation(fresh)[: clips - fresh]
    turned = np.zeros((clips - fresh, frames, 256), np.uint8)
    for clip in range(clips - fresh):
        for frame in range(frames):
            turned[clip, frame, rng.choice(256, flips, replace=False)] = 1
    bits[fresh:] = bits[of[fresh:]] ^ np.packbits(turned, axis=-1)
    clip, frame = np.repeat(np.arange(clips, dtype=np.int32), frames), np.tile(np.arange(frames, dtype=np.int32), clips)
    return ClipHashes(clip, frame, np.zeros(len(clip), np.uint8), bits.reshape(-1, BYTES)), of


@pytest.mark.parametrize("exact_pairs", [1 << 40, 0])
def test_copies_are_matched_by_all_pairs_and_by_bands(exact_pairs):
    searched, of = simulated(400, 8, 0.25, 24)
    sizes = np.full(400, 8, np.int32)
    matches = find_matches(searched, lambda: [searched], sizes, DuplicateOptions(), exact_pairs=exact_pairs)
    pairs = {(match.clip, match.other) for match in matches}
    wanted = {(int(of[clip]), clip) for clip in range(400) if of[clip] >= 0}
    assert len(wanted & pairs) >= (len(wanted) if exact_pairs else 0.97 * len(wanted))
    assert {(min(pair), max(pair)) for pair in pairs} <= wanted
    assert {match.share for match in matches} == {1.0}  # a frame in a common band, and the clips are compared in full


def test_the_searched_side_is_in_the_order_of_the_clips():
    whole, _ = simulated(9, 6, 0.25, 8)
    clips = [ClipHashes(*(column[whole.clip == clip] for column in vars(whole).values())) for clip in range(9)]
    found, sizes = searched_side(lambda: [clips[n] for n in (4, 0, 8, 3, 1, 7)], 9)
    assert found.clip.tolist() == [n for n in (0, 1, 3, 4, 7, 8) for _ in range(2)]  # every third frame
    assert np.array_equal(found.bits, np.concatenate([clips[n].bits[::3] for n in (0, 1, 3, 4, 7, 8)]))
    assert sizes.tolist() == [2, 2, 0, 2, 2, 0, 0, 2, 2]


def test_a_flipped_majority_is_no_match():
    searched, _ = simulated(60, 4, 0.5, 120)
    sizes = np.full(60, 4, np.int32)
    assert find_matches(searched, lambda: [searched], sizes, DuplicateOptions()) == []


def test_the_share_is_of_the_shorter_clip():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (20, BYTES), np.uint8)
    clip = np.array([0] * 20 + [1] * 5, np.int32)
    frame = np.r_[np.arange(20), np.arange(5)].astype(np.int32)
    hashes = ClipHashes(clip, frame, np.zeros(25, np.uint8), np.concatenate([bits, bits[8:13]]))
    (match, other) = find_matches(hashes, lambda: [hashes], np.array([20, 5], np.int32), DuplicateOptions())
    assert (match.clip, match.other, match.share, match.distance) == (0, 1, 1.0, 0)
    assert (other.clip, other.other, other.share) == (1, 0, 1.0)


def test_stars_are_not_transitive():
    """0 - 1 - 2 - 3 is a chain: 0 takes 1, and 2, which only 1 and 3 match, takes 3."""
    chain = [Match(place, place + 1, 0, 1.0, 10) for place in range(3)]
    assert [group.representative for group in star_groups(5, chain)] == [0, 0, 2, 2, 4]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] != pair[1])), st.randoms())
def test_every_member_matches_its_representative_and_the_order_of_matches_does_not_count(pairs, random):
    matches = [Match(a, b, 0, 1.0, a + b) for a, b in pairs]
    groups = star_groups(12, matches)
    for clip, group in enumerate(groups):
        assert group.representative <= clip
        assert groups[group.representative].match is None
        if group.representative != clip:
            assert {(clip, group.representative), (group.representative, clip)} & pairs
        else:
            earlier = {g.representative for g in groups if g.representative < clip}
            assert not any({(clip, other), (other, clip)} & pairs for other in earlier)
    random.shuffle(matches)
    assert star_groups(12, matches) == groups


@pytest.mark.parametrize("options", [{"distance": 200}, {"share": 0.0}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DuplicateOptions(**options)
