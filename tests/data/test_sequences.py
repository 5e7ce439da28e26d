"""T frames a clip, evenly spaced, all with one crop, flip and color."""

import numpy as np
import pytest
import torch
from test_loader import FORMATS, SMALL, equal, loader

import vito_kernels
from vito_fast.data.loader.resize_reference import view
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.store.store import Store, frames


@pytest.mark.parametrize("format", FORMATS)
def test_frames_crops_and_colors_of_a_sequence(format, stores):
    """Against frames() and the specification of a view; more frames than a sample of the method has views."""
    store = Store(stores / format)
    with (
        loader(stores / format, 3, frames=6, stride=5, augment=False) as plain,
        loader(stores / format, 3, frames=6, stride=5) as colored,
    ):
        for batch, other in zip(plain, colored, strict=True):
            assert batch["sequence"].shape == (3, 6, 32, 32, 3)
            assert other["sequence"].shape == (3, 6, 3, 32, 32)
            assert "views" not in batch
            one = Sampler(store.index, SMALL.__class__(size=32, views=1), 0).sample(batch["sample"].numpy())
            for row, clip in enumerate(batch["clip"].tolist()):
                numbers, info = batch["frame"][row].numpy(), store.index.clip(clip)
                assert (np.diff(numbers) == 5).all()
                assert numbers[0] == min(one.frame[row, 0], info.num_frames - 26)
                np.testing.assert_array_equal(batch["time"][row], store.index.times(clip)[numbers])
                crop, flip = tuple(one.crop[row, 0]), bool(one.flip[row, 0])
                params = torch.from_numpy(one.params[row : row + 1, 0].copy())
                for place, picture in enumerate(frames(store, clip, numbers)):
                    got = batch["sequence"][row, place]
                    assert np.abs(got.numpy().astype(int) - view(picture, crop, flip, 32)).max() <= 1
                    expected = vito_kernels.photometric(got[None].contiguous(), params)[0]
                    torch.testing.assert_close(other["sequence"][row, place], expected, rtol=0, atol=1e-6)


def test_a_clip_that_is_too_short_repeats_its_last_frame(stores):
    with loader(stores / "jpeg", 2, frames=4, stride=30, augment=False) as data:
        batch = next(data)
        last = [data.store.index.clip(clip).num_frames - 1 for clip in batch["clip"].tolist()]
    assert batch["frame"].tolist() == [[0, min(30, end), min(60, end), min(90, end)] for end in last]


def test_sequences_resume_and_mix(stores):
    two = {str(stores / "jpeg"): 1.0, str(stores / "copy"): 2.0}
    batches = []
    for _ in range(2):
        with loader(two, 2, frames=3, augment=False) as data:
            data.seek(1)
            batch = next(data)
            batches.append({**batch, "views": batch["sequence"].unbind(1)})
    assert equal(*batches)


@pytest.mark.parametrize("options", [{"frames": 0}, {"frames": 2, "stride": 0}])
def test_numbers_that_make_no_sense(options, stores):
    with pytest.raises(ValueError, match="is 0, must be at least 1"):
        loader(stores / "jpeg", **options)
    with pytest.raises(ValueError, match="stride is 2, but frames is None"):
        loader(stores / "jpeg", stride=2)
