"""Label propagation against the official steps' values and a dense affinity over the whole frame."""

import dataclasses
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vito_fast.evaluate import propagate
from vito_fast.evaluate.propagate import PRESETS

SMALL = {name: dataclasses.replace(preset, topk=4, radius=2.0) for name, preset in PRESETS.items()}


def g3():
    grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (4, 5, 6, 7)), indexing="ij")
    t, c, i, j = grids
    features = (1.3 * c + 0.7 * i + 0.45 * j + 0.31 * t * (c + 1)).sin()
    features += 0.5 * (0.9 * c * (i + 1) - 0.37 * j * (t + 1)).cos()
    t, i, j = torch.meshgrid(torch.arange(3), torch.arange(6), torch.arange(7), indexing="ij")
    labels = torch.nn.functional.one_hot((i // 2 + (j + t) // 3) % 3, 3).permute(0, 3, 1, 2)
    return features, labels


@pytest.mark.parametrize(
    ("name", "sums", "one"),
    [
        ("dino", (15.78426, 16.03065, 10.18509), (0.711995, 0.288005, 0)),
        ("vfs", (14.49865, 17.80398, 9.69736), (0.055995, 0.944005, 0)),
        ("crw", (14.36319, 17.19698, 10.43983), (0.016345, 0.983655, 0)),
    ],
)
def test_a_step_is_the_official_one(name, sums, one):
    features, labels = g3()
    found = propagate.step(features[3], features[:3], labels, SMALL[name])
    assert found.sum((1, 2)).tolist() == pytest.approx(sums, abs=6e-6)
    assert found[:, 3, 4].tolist() == pytest.approx(one, abs=6e-7)


def dense_step(query, context, labels, preset):
    """The definition, in float64: the affinity of all with all, a window, the top k of a row, a softmax."""
    n, _, h, w = context.shape
    query, context = (torch.nn.functional.normalize(x.double(), dim=-3) for x in (query, context))
    affinity = query.flatten(1).T @ context.permute(1, 0, 2, 3).flatten(1)
    y, x = (g.flatten() for g in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    dy, dx = y[:, None] - y, x[:, None] - x
    if preset.window == "circle":
        inside = (dy**2 + dx**2).sqrt() < preset.radius
    else:
        inside = torch.maximum(dy.abs(), dx.abs()) <= preset.radius
    inside = inside[:, None].expand(-1, n, -1).clone()
    if not preset.window_first:
        inside[:, 0] = True
    affinity[~inside.flatten(1)] = -torch.inf
    kept = affinity.topk(min(preset.topk, n * h * w), 1)
    if preset.keep_ties:
        affinity[affinity < kept.values[:, -1:]] = -torch.inf
    else:
        affinity = torch.full_like(affinity, -torch.inf).scatter(1, kept.indices, kept.values)
    weights = (affinity / preset.temperature).softmax(1)
    return (weights @ labels.double().permute(0, 2, 3, 1).flatten(0, 2)).T.unflatten(1, (h, w))


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 5),
    size=st.tuples(st.integers(1, 27), st.integers(1, 31)),
    topk=st.integers(1, 12),
    radius=st.sampled_from([1.0, 1.5, 4.0, 5.5, 40.0]),
)
def test_tiles_give_the_dense_affinity(name, seed, n, size, topk, radius):
    preset = dataclasses.replace(PRESETS[name], topk=topk, radius=radius)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(6, *size, generator=generator, dtype=torch.float64)
    context = torch.randn(n, 6, *size, generator=generator, dtype=torch.float64)
    labels = torch.rand(n, 3, *size, generator=generator)
    found = propagate.step(query, context, labels, preset)
    expected = dense_step(query, context, labels, preset).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    total = propagate.step(query, context, torch.ones(n, 1, *size), preset)
    torch.testing.assert_close(total, torch.ones(1, *size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_ties", [False, True])
def test_keys_that_tie(keep_ties):
    """Four frames alike: the four keys of a position tie, and only DINO keeps them all."""
    preset = dataclasses.replace(PRESETS["dino"], topk=2, radius=3.0, keep_ties=keep_ties)
    one = torch.randn(5, 9, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 9, 8)
    found = propagate.step(one, one.expand(4, -1, -1, -1), labels, preset)
    if keep_ties:
        torch.testing.assert_close(found, torch.full((1, 9, 8), 1.5))
    else:
        assert (found - found.round(decimals=0)).abs().max() <= 0.5 + 1e-6
        assert set((found * 2).round().flatten().tolist()) <= {1, 2, 3, 4, 5}


def test_bfloat16_features_have_float32_similarities():
    """Equal to float32 on the rounded features: neither the products nor the sums are rounded again."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(4, 16, 13, 17, generator=generator)
    labels = torch.rand(3, 2, 13, 17, generator=generator)
    preset = dataclasses.replace(PRESETS["vfs"], radius=5.0)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        low = [propagate.normalize(f).bfloat16().to(dtype) for f in features]
        memory = propagate.Memory(preset, 3, 2, low[0])
        assert memory.keys.dtype == dtype
        for slot in range(3):
            memory.write(slot, low[slot], labels[slot])
        results.append(memory.read(low[3]))
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


def test_bfloat16_runs_on_a_gpu():
    """On tensors without memory: devices and dtypes agree, and labels are float32."""
    with FakeTensorMode():
        query = torch.empty(16, 10, 12, device="cuda", dtype=torch.bfloat16)
        assert propagate.normalize(query).dtype == torch.bfloat16
        context, labels = query.expand(4, -1, -1, -1), torch.empty(4, 3, 10, 12, device="cuda")
        found = propagate.step(query, context, labels, "vfs")
        assert (found.shape, found.dtype, found.device.type) == ((3, 10, 12), torch.float32, "cuda")
        assert propagate.to_mask(found, (80, 96), (80, 96), "vfs").device.type == "cuda"


class Peak(TorchDispatchMode):
    """The most bytes at a time of tensors that are created within it."""

    def __init__(self, before):
        super().__init__()
        self.before, self.alive, self.bytes = {t.untyped_storage()._cdata for t in before}, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.alive = [known for known in self.alive if known() is not None]
        self.alive += [ref(x) for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        storages = {s._cdata: s.nbytes() for s in (known().untyped_storage() for known in self.alive)}
        self.bytes = max(self.bytes, sum(n for at, n in storages.items() if at not in self.before))
        return found


@pytest.mark.parametrize("name", ["vfs", "crw"])
def test_memory_of_a_480p_frame_is_bounded(name):
    """Beyond the features, which no part of it depends on: under 200 MiB where the whole affinity has 3.2 GiB."""
    preset, (h, w) = PRESETS[name], (60, 107)
    memory = propagate.Memory(preset, preset.memory + 1, 4, torch.zeros(2, h, w))
    memory.tiles = sorted(memory.tiles, key=lambda tile: len(tile.positions))[-2:]  # one after the other: two are all
    keys = torch.rand(2, h, w)
    with Peak([memory.keys, memory.labels, keys]) as peak:
        memory.read(keys)
    assert 1 << 20 < peak.bytes < 200 << 20


def test_contexts_are_the_published_ones():
    assert propagate.context_frames(1, PRESETS["vfs"]) == [0, 0]
    assert propagate.context_frames(3, PRESETS["vfs"]) == [0, 0, 1, 2]
    assert propagate.context_frames(21, PRESETS["vfs"]) == [0, *range(1, 21)]
    assert propagate.context_frames(2, PRESETS["crw"]) == [0] + [0] * 19 + [1]
    assert propagate.context_frames(30, PRESETS["crw"]) == [0, *range(10, 30)]
    assert propagate.context_frames(1, PRESETS["dino"]) == [0]
    assert propagate.context_frames(4, PRESETS["dino"]) == [0, 1, 2, 3]
    assert propagate.context_frames(20, PRESETS["dino"]) == [0, *range(13, 20)]


@pytest.mark.parametrize("name", PRESETS)
def test_a_video_is_a_chain_of_steps(name):
    preset = dataclasses.replace(PRESETS[name], memory=3, radius=5.0)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(9, 6, 10, 14, generator=generator)
    first = torch.rand(2, 10, 14, generator=generator)
    found = list(propagate.propagate_features(iter(features), first, preset))
    chain = [first]
    for t in range(1, len(features)):
        context = propagate.context_frames(t, preset)
        chain.append(
            dense_step(features[t], features[context], torch.stack([chain[i] for i in context]), preset).float()
        )
    torch.testing.assert_close(torch.stack(found), torch.stack(chain), rtol=0, atol=1e-4)


def test_static_videos_keep_their_labels():
    """Each position finds itself: with one key the first labels stay, in every frame and preset."""
    feature = torch.randn(16, 13, 9, generator=torch.Generator().manual_seed(2))
    first = torch.nn.functional.one_hot(torch.arange(13 * 9).view(13, 9) % 3).permute(2, 0, 1).float()
    for preset in PRESETS.values():
        preset = dataclasses.replace(preset, topk=1)
        *_, last = propagate.propagate_features([feature] * 4, first, preset)
        torch.testing.assert_close(last, first)


def test_first_labels():
    mask = torch.zeros(16, 24, dtype=torch.uint8)
    mask[:8, 12:] = 2
    nearest = propagate.first_labels(mask, (2, 3), "vfs")
    assert nearest.argmax(0).tolist() == [[0, 2, 2], [0, 0, 0]]
    assert nearest.sum(0).tolist() == [[1, 1, 1], [1, 1, 1]]
    soft = propagate.first_labels(mask, (2, 3), "crw")
    assert soft[2].tolist() == [[0, 0.5, 1], [0, 0, 0]]


def test_min_max_lets_a_weak_object_win():
    labels = torch.tensor([[0.9, 0.7], [0.1, 0.3]]).view(2, 1, 2)
    assert propagate.to_mask(labels, (1, 2), (1, 2), "crw").tolist() == [[0, 0]]
    assert propagate.to_mask(labels, (1, 2), (1, 2), "vfs").tolist() == [[0, 1]]
    nothing = torch.stack([torch.ones(3, 4), torch.zeros(3, 4)])
    assert not propagate.to_mask(nothing, (24, 32), (24, 32), "vfs").any()


def test_sizes_of_the_input():
    assert propagate.input_size(480, 854, PRESETS["vfs"]) == (480, 854)
    assert propagate.input_size(480, 854, PRESETS["dino"]) == (480, 832)
    assert propagate.input_size(1080, 1920, PRESETS["vfs"]) == (480, 853)
    assert propagate.input_size(854, 480, PRESETS["dino"]) == (832, 480)
    assert propagate.input_size(100, 90, PRESETS["crw"]) == (100, 90)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'vsf'; there are vfs, crw, dino"):
        propagate.preset_of("vsf")
    with pytest.raises(ValueError, match="context"):
        propagate.step(torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match="labels"):
        propagate.step(torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="do not fit"):
        next(propagate.propagate_features([torch.zeros(3, 4, 4)], torch.zeros(2, 4, 5)))
    with pytest.raises(ValueError, match="positive"):
        dataclasses.replace(PRESETS["vfs"], temperature=0.0)
