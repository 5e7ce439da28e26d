"""Autograd for custom ops: one pair of functions serves eager, compiled and ``torch.func`` code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vito_kernels._core.lazy_triton import on_device, recording_launches

PLAIN = (torch.Tensor, torch.nn.Parameter)
NO_DOUBLE_BACKWARD = (
    "vito_kernels is fused ({}) and has no second derivative; for double backward use vito_kernels.reference"
)


def direct_call(op: Any) -> Callable[..., Any]:
    """``op`` for calls without gradient: plain eager code calls its implementation, past the dispatcher."""
    implementation = getattr(op, "_init_fn", op)  # a private name; without it, through the dispatcher

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and not recording_launches()):
            return op(*args)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        refuse_batched(op._name, *tensors)
        plain = all(type(x) in PLAIN and not x.is_meta for x in tensors)
        if not plain:
            return op(*args)
        with on_device(tensors[0]):  # tiles are chosen for the current device
            return implementation(*args)

    return call


def autograd_op(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the gradient of ``op`` and returns the op to call from Python.

    ``torch.compile`` traces the autograd that ``torch.library`` generates, but that takes no part in ``torch.func``
    transforms; an ``autograd.Function`` with its own ``setup_context`` does. Plain eager code takes neither. The
    dispatcher and the argument binding of such a Function cost 0.2 ms of host time together, longer than small losses
    take a GPU. All three are made of the same two functions.

    Args:
        op: a custom op.
        setup_context, backward: as for ``torch.library.register_autograd``.
    """
    op.register_autograd(backward, setup_context=setup_context)
    implementation = direct_call(op)

    def eager_forward(ctx: Any, *args: Any) -> Any:
        output = implementation(*args)
        setup_context(ctx, args, output)
        return output

    backward = staticmethod(backward)
    transformed = {"forward": staticmethod(lambda *args: op(*args)), "setup_context": staticmethod(setup_context)}
    batched = {"vmap": staticmethod(functools.partial(_refuse_vmap, op._name))}
    for_func: Any = type(op._name, (torch.autograd.Function,), transformed | batched | {"backward": backward})
    eager: Any = type(
        op._name, (torch.autograd.Function,), {"forward": staticmethod(eager_forward), "backward": backward}
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        return (for_func if torch._C._are_functorch_transforms_active() else eager).apply(*args)

    return call


def refuse_batched(name: str, *tensors: torch.Tensor) -> None:
    """Refuses a batch of gradients, of autograd's own vmap."""
    for x in tensors:
        if is_legacy_batchedtensor(x):
            _refuse_vmap(name)


def _refuse_vmap(name: str, *_: Any) -> None:
    name = name.removesuffix("_backward")
    raise RuntimeError(f"vito_kernels is fused ({name}) and has no vmap; loop over the batch, or use its reference")


_FLOPS: dict[Any, Callable[..., int]] = {}


def register_flops(op: Any, formula: Callable[..., int] | None = None) -> None:
    """Notes the matrix-product flops of a custom op, for ``register_flop_formulas``.

    Args:
        op: a custom op.
        formula: takes the op's arguments by name and returns flops. None for an op without matrix products, which is
            bound by memory: 0 flops.
    """
    arguments = op._opoverload._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        if formula is None:
            return 0
        named = {a.name: value for a, value in zip(arguments, args, strict=False)}
        return formula(**defaults | named | kwargs)

    _FLOPS[op._opoverload.overloadpacket] = count


def register_flop_formulas() -> None:
    """Registers the flops of every op here with ``torch.utils.flop_counter``, so that ``FlopCounterMode`` counts them.

    Not done on import, since that module of torch imports triton. May be called again.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for packet, count in _FLOPS.items():
        if packet not in flop_registry:
            register_flop_formula(packet, get_raw=True)(count)


def refuse_double_backward(op: Any) -> Callable[..., Any]:
    """Gives a backward op a derivative that raises RuntimeError, and returns the op to call."""
    name = op._name.removesuffix("_backward")

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(NO_DOUBLE_BACKWARD.format(name))

    guarded, direct = autograd_op(op, lambda ctx, inputs, output: None, refuse), direct_call(op)

    def call(*args: Any) -> Any:
        differentiable = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        return (guarded if differentiable else direct)(*args)

    return call


class _Once(torch.autograd.Function):
    """Passes gradients on; the derivative with respect to their first ``sources`` tensors raises."""

    @staticmethod
    def forward(ctx: Any, name: str, sources: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.name = name
        return tensors[sources:]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(NO_DOUBLE_BACKWARD.format(ctx.name))


def once(
    backward: Callable[..., tuple[torch.Tensor | None, ...]], name: str = ""
) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """Decorates the backward of a Function: its own derivative raises RuntimeError.

    ``autograd.grad`` takes the second derivative for zero behind PyTorch's ``once_differentiable``.
    """
    name = name or backward.__qualname__.split(".")[0].strip("_")

    def refusing(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        sources = [x for x in (*ctx.saved_tensors, *grads) if isinstance(x, torch.Tensor)]
        return _Once.apply(name, len(sources), *sources, *found)

    return refusing


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of a 16-bit dtype, in it, or in float32 with the gradient of the identity where x requires grad."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.to(dtype)
    x = x.float()
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x + (x.to(dtype) - x).detach()
    return cast(torch.Tensor, _Rounded.apply(x, dtype))


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x). PyTorch's own stops at x = 20, although e^-20 still counts in float64."""
    return torch.nn.functional.softplus(x, threshold=50)
