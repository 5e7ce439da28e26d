"""The renderer: superquadrics are what Barr's formula says, and only the object stays in a shot."""

import numpy as np
import pytest

from vito_fast.data.objects import Shot, background, crop, make_object, render, rotation, superquadric

GRAY = [np.full((300, 400, 3), 128, np.uint8)]
NOISE = [np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)]


@pytest.mark.parametrize(("vertical", "horizontal"), [(0.25, 0.25), (1.0, 1.0), (1.6, 0.5)])
def test_superquadric(vertical, horizontal):
    radii = np.array([0.4, 0.7, 0.2])
    points, normals = superquadric(radii, vertical, horizontal, 2000)
    x, y, z = np.abs(points / radii).T
    inside = (x ** (2 / horizontal) + y ** (2 / horizontal)) ** (horizontal / vertical) + z ** (2 / vertical)
    np.testing.assert_allclose(inside, 1, rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-6)
    assert (np.sum(points * normals, 1) > 0).all(), "outward"
    assert (np.sign(points).mean(0) < 0.02).all(), "all around"


def test_an_ellipsoid_has_the_normals_of_one():
    radii = np.array([0.4, 0.7, 0.2])
    points, normals = superquadric(radii, 1.0, 1.0, 500)
    expected = points / radii**2
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(normals, expected, atol=1e-4)


def test_rotation():
    for seed in range(5):
        matrix = rotation(np.random.default_rng(seed))
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)


def test_an_object_follows_from_its_seed_and_fills_the_unit_ball():
    one, same, other = make_object(3), make_object(3), make_object(4)
    np.testing.assert_array_equal(one.points, same.points)
    assert one.points.shape != other.points.shape or (one.points != other.points).any()
    assert np.linalg.norm(one.points, axis=1).max() == pytest.approx(1, abs=1e-5)
    assert one.albedo.min() >= 0
    assert one.albedo.max() <= 1


def test_a_shot_follows_from_its_seed():
    thing = make_object(3)
    frames, masks = render(thing, NOISE, 7)
    again, _ = render(thing, NOISE, 7)
    np.testing.assert_array_equal(frames, again)
    assert frames.shape == (12, 96, 96, 3)
    assert masks.shape == (12, 96, 96)
    assert (render(thing, NOISE, 8)[0] != frames).any()


def test_the_background_passes_and_the_object_stays():
    """The object covers a fair part of every frame; of the scene behind it nothing is left four frames later."""
    shot = Shot()
    for seed in range(4):
        _, masks = render(make_object(seed), GRAY, seed, shot)
        share = masks.mean((1, 2))
        assert share.min() > 0.03
        assert share.max() < 0.6
        behind = background(np.random.default_rng(seed), NOISE, np.linspace(0, 1, 12), shot)
        near = np.corrcoef(behind[0].ravel(), behind[4].ravel())[0, 1]
        assert abs(near) < 0.6


def test_the_mask_is_the_object():
    """Before two other backgrounds the pixels of the mask are the same, and outside it they are the background's."""
    thing = make_object(5)
    black, white = ([np.full((300, 400, 3), value, np.uint8)] for value in (0, 255))
    one, masks = render(thing, black, 11)
    two, same = render(thing, white, 11)
    np.testing.assert_array_equal(masks, same)
    np.testing.assert_array_equal(one[masks], two[masks])
    assert (one[~masks] != two[~masks]).any(-1).mean() > 0.99


def test_a_turned_object_looks_otherwise():
    frames, masks = render(make_object(5), GRAY, 11)
    first, last = (frames[i].astype(float)[masks[i]].mean(0) for i in (0, -1))
    assert np.abs(first - last).max() > 5, "its light has changed"
    assert (masks[0] != masks[-1]).mean() > 0.02, "and its outline"


def test_small_photographs_are_enlarged():
    tiny = np.zeros((20, 30, 3), np.uint8)
    assert crop(np.random.default_rng(0), tiny, 112, 150).shape == (112, 150, 3)
