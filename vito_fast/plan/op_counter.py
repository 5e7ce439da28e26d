"""Runs CUDA code on tensors with shapes but no data, without a GPU, and counts its operations and memory.

``FakeTensorMode`` gives every op's output shape, dtype and device. It refuses a CPU tensor among CUDA tensors and a
value read back to the host. ``OpCounter`` adds up the arithmetic of each op, the bytes that it moves and the live
memory. Autograd's engine does not start a CUDA backward without a driver. ``OpCounter.backward`` therefore walks the
same graph and calls the same nodes.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vito_kernels import register_flop_formulas

aten = torch.ops.aten
register_flop_formulas()

KINDS = {
    **dict.fromkeys([aten.convolution, aten.convolution_backward], "convolution"),
    **dict.fromkeys([aten.mm, aten.addmm, aten.bmm, aten.baddbmm], "matmul"),
    **dict.fromkeys([aten.cudnn_batch_norm, aten.cudnn_batch_norm_backward], "normalization"),
    **dict.fromkeys([aten.native_batch_norm, aten.native_batch_norm_backward], "normalization"),
}
"""Kinds of torch's ops. This project's ops are ``fused``; all others are ``pointwise``."""
READ_TWICE = {aten.cudnn_batch_norm: 1, aten.native_batch_norm: 1}
READ_TWICE |= {aten.cudnn_batch_norm_backward: 2, aten.native_batch_norm_backward: 2}
"""Number of leading inputs that a batch norm reads twice: for the statistics and to normalize."""
FREE = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.new_empty_strided,
    aten.detach,
    aten._unsafe_view,
}
"""Ops other than views that move no data."""


class Problem(Exception):
    """A step that a GPU would not run, or not without waiting for the host."""


class Op(NamedTuple):
    """One op; equal ones are counted together."""

    phase: str
    kind: str
    flops: float
    bytes: float
    """Read and written, each tensor once, but for READ_TWICE."""
    width: int
    """Bytes of an element of its arithmetic: 2 for bfloat16, 4 for float32, 8 for float64."""


def total(ops: Counter[Op], phase: str = "", kind: str = "") -> tuple[float, float]:
    """(flops, bytes) of one phase and one kind of op (default: all)."""
    chosen = [(op, n) for op, n in ops.items() if phase in ("", op.phase) and kind in ("", op.kind)]
    return sum(n * op.flops for op, n in chosen), sum(n * op.bytes for op, n in chosen)


class _Box:
    """A tensor saved for the backward pass, emptied once it is used."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class OpCounter(TorchDispatchMode):
    """Counts all ops executed inside (``ops``: how often each), and live and peak bytes of memory by owner.

    ``in_phase`` and ``watch`` set the phase and owner of the ops. A storage belongs to the owner under which it was
    allocated until ``own`` moves it. Deterministic.

    Raises:
        Problem: a CUDA value is copied to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.owner = ""
        self.ops: Counter[Op] = Counter()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_phase = ""
        self.saved: Counter[str] = Counter()
        """Bytes saved for the backward pass when it starts, by owner."""
        self._storages: dict[int, tuple[str, int, Any]] = {}
        self._boxes: weakref.WeakSet[_Box] = weakref.WeakSet()
        self._unpacked: list[_Box] = []
        self._passes = 0

    # ----------------------------------------------------------------------------------------------------------- ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = list({id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}.values())
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.is_cuda for x in inputs) and any(x.device.type == "cpu" for x in outputs):
            raise Problem(f"the host waits for the GPU: {func} copies a CUDA tensor to the CPU")
        packet = func.overloadpacket
        counts = func.namespace in ("aten", "vito_kernels") and not func.is_view and packet not in FREE
        if counts and any(x.is_cuda for x in inputs + outputs):
            moved = sum(map(_bytes, [*inputs, *outputs, *_changed(func, args, outputs)]))
            moved += sum(map(_bytes, inputs[: READ_TWICE.get(packet, 0)]))
            width = min((x.element_size() for x in inputs if x.is_floating_point()), default=4)
            self.ops[Op(self.phase, *_kind_and_flops(func, args, kwargs, out), float(moved), width)] += 1
        for tensor in outputs:
            self.own(tensor)
        return out

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Ops inside belong to ``phase``, and their allocations to an owner of that name."""
        before = self.phase, self.owner
        self.phase = self.owner = phase
        try:
            yield
        finally:
            self.phase, self.owner = before

    @contextmanager
    def watch(self, module: nn.Module, owner_of: Callable[[str], str]) -> Iterator[None]:
        """Inside, ``owner_of(name)`` owns the allocations of a forward of the child ``name``."""
        stack: list[str] = []

        def enter(owner: str, *_: Any) -> None:
            stack.append(self.owner)
            self.owner = owner

        def leave(*_: Any) -> None:
            self.owner = stack.pop()

        handles = []
        for name, child in module.named_modules():
            if name:
                handles.append(child.register_forward_pre_hook(functools.partial(enter, owner_of(name))))
                handles.append(child.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -------------------------------------------------------------------------------------------------------- memory

    def own(self, tensor: Tensor, owner: str = "") -> None:
        """Counts a CUDA tensor's storage once, under ``owner`` or the current one. A given owner takes it over."""
        if not tensor.is_cuda:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is None:
            entry = (owner or self.owner, storage.nbytes(), weakref.ref(storage, lambda _: self._release(key)))
            self._storages[key] = entry
            self.live[entry[0]] += entry[1]
            if self.live.total() > self.peak.total():
                self.peak, self.peak_phase = self.live.copy(), self.phase
        elif owner and known[0] != owner:
            self._storages[key] = (owner, *known[1:])
            self.live[known[0]] -= known[1]
            self.live[owner] += known[1]

    def _release(self, key: int) -> None:
        owner, size, _ = self._storages.pop(key)
        self.live[owner] -= size

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, tensors saved for the backward pass are kept here, so that each can be dropped once it is used."""

        def pack(tensor: Tensor) -> _Box:
            box = _Box(tensor.detach())
            self._boxes.add(box)
            return box

        def unpack(box: _Box) -> Tensor:
            if box.tensor is None:
                raise RuntimeError("the backward pass went through this part of the graph before")
            self._unpacked.append(box)
            return box.tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _note_saved(self) -> None:
        """Adds up the saved tensors, each storage once. Parameters are not activations."""
        storages = {id(s): s for s in (b.tensor.untyped_storage() for b in self._boxes if b.tensor is not None)}
        owned = [self._storages[key][:2] for key in storages if key in self._storages]
        saved: Counter[str] = Counter()
        for owner, size in owned:
            if owner not in ("parameters", "target"):
                saved[owner] += size
        self.saved = max(self.saved, saved, key=lambda counter: counter.total())

    # ------------------------------------------------------------------------------------------------------ backward

    def backward(self, *roots: tuple[Tensor, Tensor]) -> None:
        """Gradients of the leaves under ``roots``, pairs of a tensor and its gradient, as by autograd's engine.

        Each node of the graph runs once, after all that depend on it, and then frees its saved tensors.
        """
        self._note_saved()
        self._passes += 1
        # Recomputed activations are kept for one backward pass, known by this number, which the engine would set.
        with torch.no_grad(), mock.patch.object(torch._C, "_current_graph_task_id", return_value=self._passes):
            self._walk(roots)

    def _walk(self, roots: tuple[tuple[Tensor, Tensor], ...]) -> None:
        pending: dict[Any, dict[int, Tensor]] = {}
        waiting = _dependents([tensor.grad_fn for tensor, _ in roots])
        for tensor, given in roots:
            _accumulate(pending.setdefault(tensor.grad_fn, {}), tensor.output_nr, given)
        ready = [node for node in pending if not waiting[node]]
        while ready:
            node = ready.pop()
            gradients = self._run(node, pending.pop(node, {}))
            for (child, slot), gradient in zip(node.next_functions, gradients, strict=False):
                if child is None:
                    continue
                if gradient is not None:
                    meta = child._input_metadata[slot]
                    _accumulate(pending.setdefault(child, {}), slot, _fit(gradient, meta.shape, meta.dtype))
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)

    def gradients(self, root: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """The result of ``torch.autograd.grad``. The leaves have no gradient before and after."""
        self.backward((root, torch.ones_like(root)))
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        if any(g is None for g in found):
            raise Problem("a leaf took no part in the differentiated tensor")
        return tuple(g for g in found if g is not None)

    def _run(self, node: Any, incoming: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients that ``node`` passes on. A leaf takes its gradient and passes nothing."""
        if hasattr(node, "variable"):
            for gradient in incoming.values():
                leaf: Tensor = node.variable
                fitted = _fit(gradient, leaf.shape, leaf.dtype)
                leaf.grad = fitted if leaf.grad is None else leaf.grad + fitted
                self.own(leaf.grad, "gradients")
            return ()
        if not incoming:
            return (None,) * len(node.next_functions)
        slots = node._input_metadata
        given = [incoming.get(i) for i in range(len(slots))]
        incoming.clear()
        self._unpacked.clear()
        out = node(*given) if callable(node) else node.apply(*given)  # nodes written in Python have only apply
        for box in self._unpacked:
            box.tensor = None
        return out if isinstance(out, tuple) else (out,)


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that an op touches; of an expanded one, those in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()) if tensor.is_cuda else 0


def _changed(func: Any, args: Any, outputs: list[Tensor]) -> list[Tensor]:
    """Tensors that an op writes in place and does not return."""
    written = [x for a, x in zip(func._schema.arguments, args, strict=False) if a.is_write]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor) and all(x is not y for y in outputs)]


def _kind_and_flops(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[str, float]:
    packet = func.overloadpacket
    if func.namespace == "vito_kernels":
        if packet not in flop_registry:
            raise Problem(f"{func} has no flop formula; register one beside the op (vito_kernels register_flops)")
        return "fused", float(flop_registry[packet](*args, **kwargs, out_val=out))
    flops = float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0
    return KINDS.get(packet, "pointwise"), flops


def _dependents(roots: list[Any]) -> Counter[Any]:
    """For each node under the roots, how many edges lead to it."""
    count: Counter[Any] = Counter()
    stack, seen = list(roots), set(roots)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                count[child] += 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    return count


def _accumulate(slots: dict[int, Tensor], slot: int, gradient: Tensor) -> None:
    slots[slot] = slots[slot] + gradient if slot in slots else gradient


def _fit(gradient: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    """As the engine: a gradient of a broadcast tensor is summed to its shape, and takes its dtype."""
    if gradient.shape != torch.Size(shape):
        gradient = gradient.sum_to_size(*shape)
    return gradient.to(dtype)


def _cudnn_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    last = torch.channels_last
    return last if any(t.is_contiguous(memory_format=last) for t in (x, weight)) else torch.contiguous_format


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, CUDA tensors can be made and computed with, without a driver and without memory; autocast works too, and
    convolutions have cuDNN's memory formats.
    """
    with (
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _cudnn_format),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        FakeTensorMode() as mode,
    ):
        yield mode


def to_fake_cuda(
    module: nn.Module, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
) -> None:
    """Puts fake CUDA tensors of the same shapes in place of ``module``'s parameters and buffers.

    Floating ones take ``dtype``, four-dimensional ones ``memory_format``. ``Module.to`` would swap each tensor with its
    copy, which fake ones refuse.
    """
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None:
                child._parameters[name] = nn.Parameter(_fake(p, dtype, memory_format), requires_grad=p.requires_grad)
        for name, b in child._buffers.items():
            if b is not None:
                child._buffers[name] = _fake(b, dtype, memory_format)


def _fake(tensor: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> Tensor:
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if memory_format is not None and tensor.dim() == 4:
        return torch.empty(tensor.shape, dtype=dtype, device="cuda:0", memory_format=memory_format)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cuda:0")
