"""Takes down what one call of a loss launches and computes, for :mod:`.replay`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


class UnrecordableError(Exception):
    """What a call did that cannot be repeated."""


class View(NamedTuple):
    """A tensor in some memory, at an offset in elements."""

    memory: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, base: Tensor, start: int = 0) -> Tensor:
        """The view into ``base``, which begins at byte ``start`` of it."""
        if base.dtype != self.dtype:
            size = self.dtype.itemsize
            base = base[start : start + (len(base) - start) // size * size].view(self.dtype)
        elif self.offset == 0 and base.shape == self.size and base.stride() == self.stride:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


@dataclass
class Memory:
    """One storage. ``kind``: "input", "scratch", "tensor" (scratch of its own), "result" (of an op), "constant"."""

    kind: str
    like: Tensor  # whose storage it is
    backward: bool  # whether the backward pass made it
    saved: bool = False  # whether the backward pass reads it, though the forward pass made it
    place: tuple[int, int] = (0, 0)  # memory that holds it, byte


@dataclass
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    args: list[Any]  # None where the following go
    tensors: list[tuple[int, View]]
    descriptors: list[tuple[int, View, Any]]
    compiled: Any


@dataclass
class Op:
    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[tuple[int, int]]  # index of the output, memory


class Recorder(TorchDispatchMode):
    """Takes down what a call launches and computes, below autograd and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: list[Memory] = []
        self.known: dict[int, int] = {}  # by identity of storages
        self.alive: list[Tensor] = []  # or an identity could come twice
        self.steps: tuple[list[Launch | Op], list[Launch | Op]] = [], []
        self.backward = False

    def add(self, kind: str, x: Tensor) -> int:
        self.alive.append(x)
        self.memories.append(Memory(kind, x, self.backward, place=(len(self.memories), 0)))
        self.known[x.untyped_storage()._cdata] = len(self.memories) - 1
        return len(self.memories) - 1

    def memory_of(self, x: Tensor) -> Memory | None:
        index = self.known.get(x.untyped_storage()._cdata)
        return None if index is None else self.memories[index]

    def view(self, x: Tensor) -> View:
        memory = self.memory_of(x)
        if memory is None:
            raise UnrecordableError(f"takes a tensor {tuple(x.shape)} from elsewhere")
        memory.saved |= self.backward and not memory.backward
        offset = int(x.storage_offset()) - int(memory.like.storage_offset())
        return View(memory.place[0], x.dtype, tuple(x.shape), x.stride(), offset)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(kernel.function)
        named = {name: value for name, value in kwargs.items() if name in signature.parameters}
        options = {name: value for name, value in kwargs.items() if name not in named}
        bound = signature.bind(*args, **named)
        with _disable_current_modes():  # the interpreter copies tensors
            compiled = kernel.compiled[grid](*args, **kwargs)
        step = Launch(kernel, grid, options, list(bound.arguments.values()), [], [], compiled)
        for i, value in enumerate(step.args):
            if isinstance(value, Tensor):
                step.tensors.append((i, self.view(value)))
            elif isinstance(getattr(value, "base", None), Tensor):
                step.descriptors.append((i, self.view(value.base), value))
            else:
                continue
            step.args[i] = None
        self.steps[self.backward].append(step)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if torch.Tag.data_dependent_output in func.tags or func is aten._local_scalar_dense.default:
            raise UnrecordableError(f"{func} reads a value")
        if func.overloadpacket in ALLOCATIONS:
            self.add("scratch", out)
            return out
        outputs = list(out) if isinstance(out, (tuple, list)) else [out]
        fresh = [(i, x) for i, x in enumerate(outputs) if isinstance(x, Tensor) and self.memory_of(x) is None]
        if not fresh and not func._schema.is_mutable:
            self.alive.extend(x for x in outputs if isinstance(x, Tensor))
            return out  # a view, which is taken down where it is used
        if func.namespace != "aten" or "mm" in func.overloadpacket.__name__:  # autocast would round a product anew
            raise UnrecordableError(str(func))
        constant = func is aten.full.default and out.numel() == 1
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and (memory := self.memory_of(x)) and memory.kind == "scratch":
                memory.kind = "tensor"
        if func._schema.is_mutable:
            self._check_writes(func, args, kwargs)
        taken = [tree_map_only(Tensor, self.view, x) for x in args]
        if any(isinstance(x, Tensor) for x in tree_leaves(kwargs)):
            raise UnrecordableError(f"{func} takes tensors by name")
        results = [(i, self.add("constant" if constant else "result", x)) for i, x in fresh]
        if not constant:
            self.steps[self.backward].append(Op(func, taken, kwargs, results))
        return out

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [named.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        for x in tree_leaves(written):
            memory = self.memory_of(x) if isinstance(x, Tensor) else None
            if memory and (memory.kind in ("input", "constant") or memory.backward != self.backward):
                raise UnrecordableError(f"{func} writes over what it was given")
