"""Checks of user input. Every error names the argument, the wrong value and the expected one."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vito_kernels._core.autograd import rounded

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Reduction = Literal["mean", "sum", "none"]
Exchange = Literal["gather", "ring"]
REDUCTIONS, EXCHANGES = get_args(Reduction), get_args(Exchange)
MIN_TEMPERATURE = 1 / torch.finfo(torch.float32).max  # its inverse is still finite


def check_pair(q: Tensor, k: Tensor, names: tuple[str, str] = ("q", "k")) -> None:
    """Two non-empty matrices of embeddings of one width, dtype and device.

    Under autocast dtypes may differ as they may in a matmul, except float64.
    """
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot trace vito_kernels; use torch.compile or torch.export")
    for name, x in zip(names, (q, k), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if type(x).__name__ == "DTensor":
            raise TypeError(f"{name} is a DTensor; pass {name}.to_local() to a loss of vito_kernels.distributed")
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape (rows, dimensions), got {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{names[0]} and {names[1]} must have the same width, got {q.shape[1]} and {k.shape[1]}")
    if q.dtype != k.dtype and not _mixed_by_autocast(q, k):
        raise TypeError(f"{names[0]} and {names[1]} must have the same dtype, got {q.dtype} and {k.dtype}")
    check_device(names[1], k, q)


def _mixed_by_autocast(q: Tensor, k: Tensor) -> bool:
    return autocast_enabled(q) and torch.float64 not in (q.dtype, k.dtype)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; PyTorch does not say for meta tensors."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast_inputs(*tensors: Tensor) -> tuple[list[Tensor], torch.dtype | None]:
    """Embeddings rounded as autocast rounds them for a matmul, and autocast's dtype.

    Tensors of one 16-bit dtype, or of float64, come back as they are, with None. Of the others, those without gradient
    become tensors of autocast's dtype. Those with one become float32 tensors that hold its values, with the gradient of
    the identity: no gradient is rounded to 16 bits on its way.
    """
    dtypes = {x.dtype for x in tensors}
    if not autocast_enabled(tensors[0]) or (len(dtypes) == 1 and torch.float32 not in dtypes):
        return list(tensors), None
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [rounded(x, dtype) for x in tensors], dtype


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, but the embeddings are on {like.device}; move it there")


def check_paired(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Embeddings with as many rows, where row i of one belongs to row i of the other."""
    check_pair(x, y, names)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{names[0]} and {names[1]} must have as many rows, got {x.shape[0]} and {y.shape[0]}")


def check_negatives(negatives: Tensor, q: Tensor) -> None:
    """(N, D), or (M, N, D) of as many queries."""
    if isinstance(negatives, Tensor) and negatives.dim() == 3:
        if negatives.shape[0] != q.shape[0]:
            raise ValueError(f"negatives must have those of {q.shape[0]} queries, got shape {tuple(negatives.shape)}")
        negatives = negatives[0]
    check_pair(q, negatives, ("q", "negatives"))


def check_no_grad(name: str, x: Tensor) -> None:
    """Keys to which a loss gives no gradient."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name} requires grad, but this loss gives locked keys no gradient; pass {name}.detach()")


def is_number(x: Any) -> bool:
    """A real number of Python or NumPy."""
    return type(x) is float or (isinstance(x, Real) and not isinstance(x, bool))


def is_integer(x: Any) -> bool:
    """An integer of Python or NumPy."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def check_integers(**values: int) -> None:
    for name, value in values.items():
        if not is_integer(value):
            raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_flags(**values: bool) -> None:
    """Booleans; no string that reads "False", and no tensor."""
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def scale_tensor(scale: float | Tensor, like: Tensor) -> Tensor:
    """The inverse temperature as a 0-d tensor: float64 for float64 embeddings, otherwise float32.

    A number must be finite in that dtype. The ops check a tensor themselves, by ``check_finite``.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be a number or a tensor of one element, got shape {tuple(scale.shape)}")
        if not scale.dtype.is_floating_point:
            raise TypeError(f"scale must be a floating-point tensor, got {scale.dtype}")
        check_device("scale (or temperature)", scale, like)
        scale = scale if scale.dim() == 0 else scale.reshape(())  # a view of the same shape costs a backward node
        return scale.to(dtype)
    scale = check_scale(scale, like)
    if torch.compiler.is_compiling():  # as a constant of the graph, each new value would recompile
        return torch.ones((), dtype=dtype, device=like.device) * scale
    return torch.full((), scale, dtype=dtype, device=like.device)


def check_scale(scale: float, like: Tensor, name: str = "scale") -> float:
    """A number that is finite in the dtype of sums over embeddings ``like``."""
    if type(scale) is float and -1e38 < scale < 1e38:
        return scale
    if not is_number(scale):
        raise TypeError(f"{name} must be a number or a tensor of one element, got {type(scale).__name__}")
    scale, dtype = float(scale), torch.float64 if like.dtype == torch.float64 else torch.float32
    most = torch.finfo(dtype).max
    if not -most <= scale <= most:
        raise ValueError(f"{name} must fit {dtype} and be finite, got {scale}")
    return scale


def check_finite(scale: Tensor) -> None:
    """Checks the value of a CPU tensor; to read it from a GPU would stop the host."""
    if scale.is_cpu and not math.isfinite(value := scale.item()):
        raise ValueError(f"temperature must be positive, and scale, or 1 / temperature, finite, got {value}")


def inverse_temperature(temperature: float | Tensor) -> float | Tensor:
    """1 / temperature, of a positive number or a (learnable) tensor of one element.

    The value of a CPU tensor is checked in eager code. Elsewhere the host does not read it, and the loss is NaN if it
    is not positive.
    """
    if type(temperature) is float and MIN_TEMPERATURE <= temperature < math.inf:
        return 1 / temperature
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be a number or one element, got shape {tuple(temperature.shape)}")
        if not temperature.dtype.is_floating_point:
            raise TypeError(f"temperature must be a floating-point tensor, got {temperature.dtype}")
        inverse = temperature.reshape(()).double().reciprocal()  # in its own type it would be rounded
        if _is_readable(temperature):
            _check_temperature(temperature.item())
            return inverse
        return torch.where(inverse > 0, inverse, torch.nan)
    if not is_number(temperature):
        raise TypeError(f"temperature must be a number or a tensor, got {type(temperature).__name__}")
    temperature = float(temperature)  # NumPy's would round the quotient
    _check_temperature(temperature)
    return 1 / temperature


def _check_temperature(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {value}")
    if value < MIN_TEMPERATURE:
        raise ValueError(f"temperature must be at least {MIN_TEMPERATURE:.3g}, got {value}")


def _is_readable(x: Tensor) -> bool:
    """Whether the host may read x: no graph is traced, no GPU stalled."""
    plain = not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)
    return plain and x.is_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_ids(name: str, ids: Tensor, rows: int, like: Tensor) -> None:
    """One integer for each row: a group or a label."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    if ids.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one entry for each row, got {tuple(ids.shape)}")
    check_device(name, ids, like)


def check_groups(q_group: Tensor | None, k_group: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Both groups or neither."""
    if (q_group is None) != (k_group is None):
        missing = "q_group" if q_group is None else "k_group"
        raise ValueError(f"q_group and k_group go together, but {missing} is None")
    if q_group is not None and k_group is not None:
        check_ids("q_group", q_group, q.shape[0], q)
        check_ids("k_group", k_group, k.shape[0], k)


def positive_columns(positive: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The positives as (M, P) int64 key indices. None, key i for query i, stays None: its layout is known."""
    if positive is None:
        if q.shape[0] > k.shape[0]:
            raise ValueError(
                f"positive=None pairs query i with key i, but there are {q.shape[0]} queries and {k.shape[0]} keys"
            )
        return None
    if not isinstance(positive, Tensor):
        raise TypeError(f"positive must be a tensor, got {type(positive).__name__}")
    if positive.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positive must hold int64 or int32 key indices, got {positive.dtype}")
    if positive.dim() not in (1, 2) or positive.shape[0] != q.shape[0] or positive.numel() == 0:
        raise ValueError(f"positive must have shape ({q.shape[0]},) or ({q.shape[0]}, P), got {tuple(positive.shape)}")
    check_device("positive", positive, q)
    return positive.long().reshape(q.shape[0], -1)


def check_positive_range(positive: Tensor, keys: int) -> None:
    """Indices within the keys, on the CPU; to read them from a GPU would stop the host."""
    low, high = (int(x) for x in positive.aminmax())
    if low < 0 or high >= keys:
        raise ValueError(f"positive must lie in [0, {keys}), got {low if low < 0 else high}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_exchange(exchange: str) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")


def check_options(
    label_smoothing: float,
    hard_negatives: float,
    debias: float,
    positive: Tensor | None,
    group: Tensor | None,
    decoupled: bool = False,
) -> None:
    """Options of InfoNCE, each in its range and only in combinations with a meaning."""
    floats = type(label_smoothing) is type(hard_negatives) is type(debias) is float
    if floats and decoupled is False and label_smoothing == hard_negatives == debias == 0:
        return
    options = {"label_smoothing": label_smoothing, "debias": debias, "hard_negatives": hard_negatives}
    for name, value in options.items():
        if not is_number(value):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if name != "hard_negatives" and not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if not 0 <= hard_negatives < math.inf:
        raise ValueError(f"hard_negatives must be finite and at least 0, got {hard_negatives}")
    check_flags(decoupled=decoupled)
    if decoupled and any(options.values()):
        raise ValueError(f"decoupled=True goes without {', '.join(n for n, value in options.items() if value)}")
    many = isinstance(positive, Tensor) and positive.dim() == 2 and positive.shape[1] > 1
    if label_smoothing and (hard_negatives or debias or many or group is not None):
        raise ValueError(
            f"label_smoothing={label_smoothing} needs one positive for each query and no groups, "
            "and goes with neither hard_negatives nor debias"
        )


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """``loss`` (M,) as its mean, its sum, or itself."""
    check_reduction(reduction)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss
