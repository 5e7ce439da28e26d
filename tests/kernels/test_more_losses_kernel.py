"""SigLIP, SupCon of two sets, decoupled losses and top-k accuracy by Triton, on a GPU or in the interpreter."""

from __future__ import annotations

import more_losses_cases as cases
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns where the kernels overflow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", cases.NAMES)
def test_against_the_reference(name, dtype, device):
    cases.check(name, device, dtype, "mean" if dtype == torch.bfloat16 else "none")


def test_pairs_of_probability_one(device):
    cases.check_likely_pairs(device)


def test_accuracy(device):
    cases.check_accuracy(device)
