"""The demo's scenes of two objects are a copy that label propagation reads."""

import numpy as np

from vito_fast.evaluate import davis, demo


def test_scenes_are_in_davis_layout_and_move_slowly(tmp_path):
    for number in range(2):
        frames, ids = demo.scene((2 * number, 2 * number + 1), number)
        assert frames.shape == (12, 160, 160, 3)
        assert np.unique(ids).tolist() == [0, 1, 2]
        shared = [(a & b).sum() / (a | b).sum() for a, b in zip(ids[1:] > 0, ids[:-1] > 0, strict=True)]
        assert min(shared) > 0.3
        demo.write_sequence(tmp_path, f"scene-{number:02d}", frames, ids)
    assert davis.problems(tmp_path, exact=False) == []
    perfect = davis.evaluate_results(tmp_path / "Annotations" / "480p", tmp_path)
    assert perfect.summary["J&F-Mean"] == 1
    assert len(perfect.objects) == 4
