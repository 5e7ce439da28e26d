"""Photometric augmentation's Triton kernels against the reference in float64."""

import pytest
import torch
from photometric_cases import IDENTITY, gray_levels, photographs, random_params

from vito_kernels import photometric, reference


def assert_equals_reference(images, params, **options):
    ours = photometric(images, params, **options)
    assert gray_levels(ours, reference.photometric(images, params, **options, dtype=torch.float64)) < 1e-3
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_every_order(device):
    images, params = photographs(24, 20, 11).to(device), random_params(24, seed=1).to(device)
    params[:, 4] = torch.arange(24)
    assert_equals_reference(images, params)


@pytest.mark.parametrize("size", [(41, 9), (1, 1), (3, 70)], ids=str)
@pytest.mark.parametrize("kernel_size", [None, 1, 7])
def test_ragged_sizes(size, kernel_size, device):
    images, params = photographs(3, *size).to(device), random_params(3, seed=2).to(device)
    assert_equals_reference(images, params, kernel_size=kernel_size)


def test_more_pixels_than_a_program_takes(device):
    assert_equals_reference(photographs(2, 150, 130).to(device), random_params(2, seed=3).to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_err_at_most_as_rounding_does(dtype, device):
    images, params = photographs(4, 40, 30).to(device), random_params(4, seed=2).to(device)
    exact = reference.photometric(images, params, dtype=torch.float64)
    error = (photometric(images, params, dtype=dtype).double() - exact).abs().max()
    assert error <= 2 * (reference.photometric(images, params, dtype=dtype).double() - exact).abs().max()


def test_identity_only_normalizes(device):
    images = photographs(2, 17, 13).to(device)
    ours = photometric(images, IDENTITY.expand(2, -1).to(device), mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(ours.permute(0, 2, 3, 1), images.float() / 255)


def test_solarize_at_values_that_bytes_take(device):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(6, -1, -1, 3).contiguous().to(device)
    params = IDENTITY.expand(6, -1).clone()
    params[:, 7] = torch.tensor([0.0, 0.2, 0.4, 0.5, 0.6, 1.0])
    params = params.to(device)
    assert gray_levels(photometric(images, params), reference.photometric(images, params)) < 1e-3  # float32 thresholds


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (0, float("nan")),
        (1, float("inf")),
        (4, 24),
        (4, -2),
        (4, 1.5),
        (5, 0.5),
        (6, -1),
        (6, float("nan")),
        (7, float("nan")),
    ],
)
def test_invalid_parameters_never_pass_silently(column, value, device):
    """On a GPU their images are NaN, and no others; on a CPU, where values can be read, they raise."""
    images, params = photographs(3, 9, 8).to(device), random_params(3, seed=3).to(device)
    params[1, column] = value
    if device == "cpu":
        with pytest.raises(ValueError, match="row 1"):
            photometric(images, params)
    import importlib

    module = importlib.import_module("vito_kernels.photometric.op")
    out = module.launch(images, params, 1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.float32)
    assert out[1].isnan().all()
    assert out[0].isfinite().all()
    assert out[2].isfinite().all()


def test_deterministic(device):
    images, params = photographs(3, 33, 31).to(device), random_params(3, seed=4).to(device)
    assert torch.equal(photometric(images, params), photometric(images, params))


if torch.cuda.is_available():

    def test_cuda_graph():
        images, params = photographs(4, 64, 64).cuda(), random_params(4, seed=5).cuda()
        photometric(images, params)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = photometric(images, params)
        images.copy_(photographs(4, 64, 64, seed=9).cuda())
        params.copy_(random_params(4, seed=6).cuda())
        graph.replay()
        assert torch.equal(captured, photometric(images, params))
