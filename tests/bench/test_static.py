"""Counted figures: packets per frame are the planner's optimum, instructions are the same on every run."""

import shutil

import pytest

from bench import static


def test_kernels_execute_what_the_method_costs():
    executed, missing = static.execute()
    assert missing == []

    def product(rows, columns, width=48):
        """Flops of one product in tiles of 16 x 16."""
        return 2 * (-(-rows // 16) * 16) * (-(-columns // 16) * 16) * width

    flops = {kernel: figures["flops"] for kernel, figures in executed.items()}
    assert flops["info_nce: similarity_lse_fwd_kernel"] == 2 * product(40, 72)  # logits, and the keys' mean
    assert flops["info_nce: similarity_lse_bwd_kernel"] == 2 * product(72, 40)
    assert flops["ntxent: similarity_lse_fwd_kernel"] == product(80, 80)  # of both views against themselves
    assert flops["ntxent: similarity_lse_bwd_kernel"] == 2 * product(80, 80)
    assert flops["attention_pool: attention_pool_fwd_kernel"] == 0
    read = executed["attention_pool: attention_pool_fwd_kernel"]["bytes_read"]
    assert read == 2 * (2 * 49 * 80) + 3 * (2 * 2 * 49)  # all features once; logits for maximum, sum and weights
    norms, update = (executed[f"lars: lars_{name}_kernel"] for name in ("norms", "update"))
    assert (norms["launches"], update["launches"]) == (1, 1)
    assert norms["bytes_read"] == 8 * 20077 + 3 * (2 * 8 + 3 * 4)  # two passes, and a table's row for each of 3 chunks
    parts = 2 * 4 * (2 * 2 + 1)  # both sums of each chunk of the tensor, by each of its chunks
    assert update["bytes_read"] == 12 * 20141 + parts + 4 * (3 * 8 + 4 * 4)
    assert update["bytes_written"] == 8 * 20141


@pytest.mark.parametrize(("gop", "low", "high"), [(1, 1.0, 1.0), (8, 3.5, 4.5), (250, 55, 70)])
def test_packets_per_frame(tmp_path, gop, low, high):
    assert low <= static.packets_per_frame(tmp_path, gop, samples=128) <= high


def test_instructions_are_exact_or_named_as_missing():
    if shutil.which("valgrind") and shutil.which("g++"):
        counts, missing = static.count()
        assert missing == []
        assert 1000 < counts["sampler: instructions a sample of 2 views"] < 20_000
    else:
        counts, missing = static.count()
        assert missing[0].startswith("instructions:")
    assert counts["packets per frame, GOP 1"] == 1.0
