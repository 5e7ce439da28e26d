"""Batch norm over ranks on CUDA: how torch's kernels are put together, with their formulas in place of the kernels."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vito_fast.model.norm import _CudaNorm

AXES, EPS, MOMENTUM, SIZES = (0, 2, 3), 1e-5, 0.1, (3, 5)


def over(values):
    return values.view(-1, 1, 1)


def stats(x, eps):
    return x.mean(AXES), (x.var(AXES, correction=0) + eps).rsqrt()


def gather_stats(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    share = (counts / counts.sum())[:, None]
    mean = (means * share).sum(0)
    variance = ((invstds**-2 - eps + (means - mean) ** 2) * share).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (variance + eps).rsqrt()


def elemt(x, weight, bias, mean, invstd, eps):
    return (x - over(mean)) * over(invstd * weight) + over(bias)


def backward_reduce(grad, x, mean, invstd, weight, *needed):
    sum_dy, sum_dy_xmu = grad.sum(AXES), (grad * (x - over(mean))).sum(AXES)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    pull = over(sum_dy) + (x - over(mean)) * over(invstd**2 * sum_dy_xmu)
    return (grad - pull / counts.sum()) * over(invstd * weight)


def run(norm, x, slope):
    """(output, its gradients, running statistics) of ``norm``, a function of (x, weight, bias, mean, variance)."""
    weight, bias = torch.linspace(0.5, 2, 6).double().requires_grad_(), torch.ones(6).double().requires_grad_()
    running = torch.zeros(6).double(), torch.ones(6).double()
    x = x.requires_grad_()
    y = norm(x, weight, bias, *running)
    return y.detach(), *torch.autograd.grad((y * slope).sum(), [x, weight, bias]), *running


def rank_equals_whole(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.batch_norm_stats, torch.batch_norm_gather_stats_with_counts = stats, gather_stats
    torch.batch_norm_elemt = elemt
    torch.batch_norm_backward_reduce, torch.batch_norm_backward_elemt = backward_reduce, backward_elemt
    x, slope = torch.randn(2, sum(SIZES), 6, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * 3 + 5
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))

    def whole(x, weight, bias, mean, variance):
        return nn.functional.batch_norm(x, mean, variance, weight, bias, True, MOMENTUM, EPS)

    y, gx, g_weight, g_bias, *running = run(whole, x.clone(), slope)
    found = run(lambda *given: _CudaNorm.apply(*given, MOMENTUM, EPS), x[mine].clone(), slope[mine])
    for parameter in found[2:4]:  # DDP adds up what each rank finds for the parameters
        dist.all_reduce(parameter)
    torch.testing.assert_close(found, (y[mine], gx[mine], g_weight, g_bias, *running), rtol=1e-9, atol=1e-10)
    dist.destroy_process_group()


def test_unequal_ranks_on_cuda_equal_one_batch(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(rank_equals_whole, (tmp_path / "store",), nprocs=2)


def test_the_kernels_take_these_arguments():
    """Their signatures, as torch declares them: a change would be noticed here and not on eight GPUs."""
    names = {
        "batch_norm_stats": "input eps",
        "batch_norm_gather_stats_with_counts": "input mean invstd running_mean running_var momentum eps counts",
        "batch_norm_elemt": "input weight bias mean invstd eps",
        "batch_norm_backward_reduce": "grad_out input mean invstd weight input_g weight_g bias_g",
        "batch_norm_backward_elemt": "grad_out input mean invstd weight sum_dy sum_dy_xmu count",
    }
    for name, arguments in names.items():
        schema = getattr(torch.ops.aten, name).default._schema
        assert " ".join(argument.name for argument in schema.arguments) == arguments
