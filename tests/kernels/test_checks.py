"""What the losses take as their numbers and tensors beside the embeddings, and what they say of the rest."""

from __future__ import annotations

import pytest
import torch
from contrastive_cases import embeddings

import vito_kernels as vk

OPTIONS = [{}, {"label_smoothing": 0.1}, {"hard_negatives": 0.5}, {"debias": 0.1, "hard_negatives": 0.5}]


def pair(dtype=torch.float32):
    return [embeddings(6, 16, dtype, "cpu", i, True) for i in range(2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_temperature_of_one_element_has_any_shape(shape, options):
    q, k = pair()
    expected = vk.info_nce(q, k, temperature=0.1, reduction="none", **options)
    for dtype in (torch.float32, torch.float64):
        temperature = torch.full(shape, 0.1, dtype=dtype, requires_grad=True)
        found = vk.info_nce(q, k, temperature=temperature, reduction="none", **options)
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found.sum(), temperature)[0].shape == shape
