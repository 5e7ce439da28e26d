"""Several stores in one run: shares, purity, resume, and samples that are those of the store alone."""

import numpy as np
import pytest
import torch
from test_loader import SMALL, equal, loader

from vito_fast.data.loader.loader import SEED_STEP, ClipLoader
from vito_fast.data.loader.mixture import PERIOD, Mixture


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [3, 1e-2, 5]])
def test_each_store_has_its_share_and_each_of_its_samples_once(weights):
    mixture = Mixture(weights, seed=5)
    stores, own = mixture.assign(np.arange(3 * PERIOD))
    for store, weight in enumerate(weights):
        mine = own[stores == store]
        assert abs(len(mine) / (3 * PERIOD) - weight / sum(weights)) <= 1 / PERIOD
        assert sorted(mine.tolist()) == list(range(len(mine)))
        share = (stores[:1000] == store).mean()
        assert abs(share - weight / sum(weights)) < 0.08, "early on, too"
    again = Mixture(weights, seed=5).assign(np.arange(PERIOD - 3, PERIOD + 3))
    np.testing.assert_array_equal(again[0], stores[PERIOD - 3 : PERIOD + 3])
    np.testing.assert_array_equal(again[1], own[PERIOD - 3 : PERIOD + 3])


@pytest.mark.parametrize("weights", [[0.0, 1], [-1, 1], [float("nan")], [1e-9, 1]])
def test_weights_that_make_no_sense(weights):
    with pytest.raises(ValueError, match="weight"):
        Mixture(weights, seed=0)


@pytest.fixture
def two(stores):
    return {str(stores / "jpeg"): 3.0, str(stores / "h264"): 1.0}


def test_samples_are_those_of_their_stores(two, stores):
    """Views, clips and frames are what the store alone gives; videos of two stores are never the same."""
    alone = [
        loader(stores / name, 1, seed=(2 + number * SEED_STEP) % 2**64) for number, name in enumerate(("jpeg", "h264"))
    ]
    with ClipLoader(two, 3, seed=2, sampler=SMALL, threads=2) as data:
        assert len(data) == sum(len(each.store) for each in alone) // 3
        seen = [0, 0]
        for batch in data:
            which, own = Mixture([3, 1], 2).assign(batch["sample"].numpy())
            assert batch["store"].tolist() == which.tolist()
            for row, (store, number) in enumerate(zip(which.tolist(), own.tolist(), strict=True)):
                single = alone[store].batch(number)
                assert single["sample"].item() == number
                for name in ("clip", "frame", "time"):
                    assert torch.equal(batch[name][row], single[name][0])
                for view, expected in zip(batch["views"], single["views"], strict=True):
                    torch.testing.assert_close(view[row], expected[0], rtol=0, atol=1e-6)
                videos = 1 + int(alone[0].store.index.clip(len(alone[0].store) - 1).video)
                assert batch["video"][row] == single["video"][0] + store * videos
                seen[store] += 1
        assert seen[0] > seen[1]
    for each in alone:
        each.close()


def test_a_mixture_resumes_exactly_on_any_number_of_ranks(two):
    with ClipLoader(two, 2, seed=1, sampler=SMALL, threads=2) as data:
        batches = [batch for _ in range(2) for batch in data]
        data.seek(3)
        state = data.state_dict()
        assert equal(next(data), batches[3])
    parts = []
    for rank in range(2):
        with ClipLoader(two, 1, seed=1, rank=rank, world_size=2, sampler=SMALL, threads=1) as data:
            data.load_state_dict(state)
            parts.append(next(data))
    for name in ("clip", "store", "video"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batches[3][name])
    with (
        ClipLoader({**two, next(iter(two)): 1.0}, 2, seed=1, sampler=SMALL) as other,
        pytest.raises(ValueError, match="state is of store"),
    ):
        other.load_state_dict(state)
