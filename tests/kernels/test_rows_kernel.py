"""The kernels of ``normalize`` and ``softplus_loss``, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import rows_cases as cases
import torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of divisions that a mask leaves out


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalize_is_as_exact_as_torch(device, dtype, shape):
    cases.check_normalize(device, dtype, shape)


def test_rows_without_length(device):
    cases.check_rows_without_length(device)


def test_strided_rows(device):
    cases.check_strided_rows(device)


@pytest.mark.parametrize(("pairs", "sides"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_softplus_loss_is_as_exact_as_torch(device, pairs, sides):
    cases.check_softplus_loss(device, pairs, sides)


def test_softplus_loss_at_its_ends(device):
    cases.check_softplus_loss_at_its_ends(device)


def test_softplus_loss_gradient_of_a_wide_matrix(device, tmp_path):
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 9e9:
        pytest.skip("its matrix takes 8.6 GB")
    cases.check_softplus_loss_gradient_of_a_large_matrix(device, tmp_path / "matrix")
