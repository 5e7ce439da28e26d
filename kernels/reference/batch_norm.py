"""Specification of batch norm in training, and of the sum and ReLU after it, in plain PyTorch."""

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    groups: int = 1,
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias [+ residual]``, then ``max(y, 0)`` with ``relu``.

    Mean and biased variance of each of the C channels of x, (B, C) or (B, C, H, W), over all else. The running
    statistics move by ``momentum`` towards the mean and the unbiased variance. All in float32, or in float64 if x is
    float64; y has the dtype of x. ``groups``: consecutive equal shares of the batch, normalized one after the other.
    """
    if groups > 1:
        running = running_mean, running_var
        residuals = [None] * groups if residual is None else residual.chunk(groups)
        return torch.cat(
            [
                batch_norm(share, weight, bias, *running, momentum=momentum, eps=eps, residual=last, relu=relu)
                for share, last in zip(x.chunk(groups), residuals, strict=True)
            ]
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.movedim(1, -1).flatten(0, -2)
    mean, var = rows.mean(0), rows.var(0, correction=0)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(rows.var(0), momentum)
    z = ((rows - mean) * (var + eps).rsqrt() * weight + bias).view(wide.movedim(1, -1).shape).movedim(-1, 1)
    z = z if residual is None else z + residual
    return (torch.relu(z) if relu else z).to(x.dtype)
