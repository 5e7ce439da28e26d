"""Plain eager calls of a loss, replayed: the launches of one call, without the Python that chose them.

Up to a few thousand rows the host takes longer than the GPU. So the second call of a kind is recorded, forward and
backward pass: its Triton launches, its few PyTorch ops, and the memory that each of them reads and writes. From the
third call on, one ``autograd.Function`` repeats the recording on the memory of the new tensors.

    plan = plans[shapes, strides, alignments, dtypes, devices, gradients wanted, autocast, options]
    tensors = [inputs, one scratch tensor, results];  for step in plan: step(tensors, addresses, stream)

A plan holds neither a tensor of the caller nor an address; stream and addresses are those of the call. A call that does
more than launch kernels and PyTorch ops (reads a value, say) cannot be recorded and runs as before. So does compiled,
transformed, traced and captured code, the CPU, and whatever takes much memory, where the host does not count.
``VITO_KERNELS_REPLAY=0`` in the environment turns replaying off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vito_kernels._core.autograd import PLAIN, once, refuse_batched
from vito_kernels._core.checks import autocast_enabled
from vito_kernels._core.lazy_triton import active_driver, cdiv, current_stream, on_device, record_launches
from vito_kernels.contrastive import gpu
from vito_kernels.contrastive.record import Launch, Memory, Op, Recorder, UnrecordableError, View
from vito_kernels.contrastive.tile_configs import matmul_precision

P = ParamSpec("P")
ENABLED = os.environ.get("VITO_KERNELS_REPLAY", "1") != "0"
MOST_PLANS = 256  # of a loss; the oldest leaves
MOST_BOUND = 8  # sets of addresses of a pass whose arguments are kept
MOST_SCRATCH = 1 << 26  # bytes of a pass
ALIGNMENT = 256  # bytes, of each piece of scratch

# ---- plans


class Pointer:
    """Stands for the tensor of a descriptor."""

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


Step = Callable[[list[Any], list[int]], None]  # of tensors and their addresses, which it completes
Place = Callable[[View], tuple[int, int]]  # index among the tensors, byte


class CompiledLaunch:
    """By the launcher of the compiled kernel, past the binding of arguments and the look-up of the kernel."""

    def __init__(self, launch: Launch, place: Place):
        self.compiled, self.grid, self.constant = launch.compiled, (*launch.grid, 1, 1)[:3], launch.args
        self.run = self.compiled.run
        self.head = *self.grid, self.compiled.function, self.compiled.packed_metadata
        self.pointers = [(i, *place(view)) for i, view in launch.tensors]
        self.descriptors = [
            (i, *place(view), type(given), {name: value for name, value in vars(given).items() if name != "base"})
            for i, view, given in launch.descriptors
        ]

    def arguments(self, addresses: list[int]) -> list[Any]:
        """Of the kernel, on memory of these addresses."""
        args = self.constant.copy()
        for i, tensor, byte in self.pointers:
            args[i] = addresses[tensor] + byte
        for i, tensor, byte, kind, fields in self.descriptors:
            args[i] = descriptor = object.__new__(kind)  # checked when recorded; the key of a plan holds what it checks
            descriptor.__dict__ = {"base": Pointer(addresses[tensor] + byte), **fields}
        return args

    def observed(self, stream: int, enter: Any, leave: Any, args: list[Any]) -> None:
        """Launches with the hooks of a profiler."""
        x, y, z, function, metadata = self.head
        given = self.compiled.launch_metadata(self.grid, stream, *args)
        self.run(x, y, z, stream, function, metadata, given, enter, leave, *args)


def launch_hooks() -> Callable[[], tuple[Any, Any]]:
    """A function that returns Triton's hooks on a launch, a profiler's, or twice None."""
    import triton

    knobs = triton.knobs.runtime

    def hooks() -> tuple[Any, Any]:
        enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
        return (enter, leave) if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) else (None, None)

    return hooks


def interpreted_launch(launch: Launch, place: Place) -> Step:
    """By Triton's front door, which takes tensors."""
    kernel, constant, views = (
        launch.kernel.compiled[launch.grid],
        launch.args,
        [(i, v, *place(v)) for i, v in launch.tensors],
    )

    def step(tensors: list[Any], addresses: list[int]) -> None:
        args = constant.copy()
        for i, view, tensor, byte in views:
            args[i] = view.of(tensors[tensor], byte - view.offset * view.dtype.itemsize)
        kernel(*args, **launch.options)

    return step


def torch_op(op: Op, place: Place, entries: dict[int, int]) -> Step:
    function, constant, kwargs = op.function, op.args, op.kwargs
    views = [(i, place(x)[0], x) for i, x in enumerate(constant) if isinstance(x, View)]
    lists = [(i, [(place(y)[0], y) for y in x]) for i, x in enumerate(constant) if _is_list(x)]
    results = [(i, entries[memory]) for i, memory in op.results]

    def step(tensors: list[Any], addresses: list[int]) -> None:
        args = constant.copy()
        for i, tensor, view in views:
            args[i] = view.of(tensors[tensor])
        for i, several in lists:
            args[i] = [view.of(tensors[tensor]) for tensor, view in several]
        out = function(*args, **kwargs)
        for i, tensor in results:
            tensors[tensor] = result = out[i] if isinstance(out, (tuple, list)) else out
            addresses[tensor] = result.data_ptr()

    return step


def _is_list(x: Any) -> bool:
    """Whether x is a list of tensors."""
    return isinstance(x, list) and bool(x) and all(isinstance(y, View) for y in x)


class Pass:
    """The forward or the backward pass of a plan.

    Args:
        recorder: with all memories in their places.
        given: the memories whose tensors a call gives.
        outputs: views of its results, None for a gradient that is not there.
    """

    def __init__(self, recorder: Recorder, backward: bool, given: list[int], outputs: list[View | None]):
        memories = list(enumerate(recorder.memories))
        mine = [(i, m) for i, m in memories if m.backward == backward and m.kind == "tensor"]
        constants = [(i, m) for i, m in memories if m.kind == "constant"]
        results = [i for i, m in memories if m.backward == backward and m.kind == "result"]
        order = [*given, *(i for i, _ in constants), *(i for i, _ in mine), *results]
        self.entries = {memory: entry for entry, memory in enumerate(order)}
        self.constants, self.device = [m.like for _, m in constants], recorder.memories[0].like.device
        self.tensors = [(tuple(m.like.shape), m.like.stride(), m.like.dtype) for _, m in mine]
        self.empty, self.unset = [None] * len(results), [0] * len(results)

        def place(view: View) -> tuple[int, int]:
            memory, byte = recorder.memories[view.memory].place
            return self.entries[memory], byte + view.offset * view.dtype.itemsize

        self.steps: list[Step | CompiledLaunch] = [
            torch_op(step, place, self.entries)
            if isinstance(step, Op)
            else (CompiledLaunch if hasattr(step.compiled, "packed_metadata") else interpreted_launch)(step, place)
            for step in recorder.steps[backward]
        ]
        self.hooks = launch_hooks() if any(isinstance(step, CompiledLaunch) for step in self.steps) else None
        self.bound: dict[tuple[int, ...], tuple[list[int], list[Any]]] = {}  # addresses, and what they gave each step
        self.outputs = [None if view is None else (self.entries[view.memory], view) for view in outputs]

    def __call__(self, given: Sequence[Tensor]) -> tuple[list[Any], list[Tensor | None]]:
        tensors: list[Any] = [*given, *self.constants]
        for size, stride, dtype in self.tensors:
            tensors.append(torch.empty_strided(size, stride, dtype=dtype, device=self.device))
        addresses = [x.data_ptr() for x in tensors] + self.unset
        tensors += self.empty
        with on_device(given[0]):
            self._run(tensors, addresses)
        return tensors, [None if out is None else out[1].of(tensors[out[0]]) for out in self.outputs]

    def _run(self, tensors: list[Any], addresses: list[int]) -> None:
        """Runs the steps. An allocator mostly gives a training step the memory of one before: arguments stay then."""
        stream, given, ready = current_stream(), list[Any](), len(addresses) - len(self.unset)
        key = tuple(addresses[:ready])  # of the others the steps find out
        known, bound = self.bound.get(key, ([], []))
        enter, leave = (None, None) if self.hooks is None else self.hooks()
        same = bool(bound)
        for i, step in enumerate(self.steps):
            if not isinstance(step, CompiledLaunch):
                step(tensors, addresses)
                given.append(None)
                same = same and all(x in (0, y) for x, y in zip(addresses[ready:], known[ready:], strict=True))
                continue
            args = bound[i] if same else step.arguments(addresses)
            given.append(args)
            if enter is None:
                x, y, z, function, metadata = step.head
                step.run(x, y, z, stream, function, metadata, None, None, None, *args)
            else:
                step.observed(stream, enter, leave, args)
        if not same:
            if len(self.bound) >= MOST_BOUND:
                self.bound.clear()
            self.bound[key] = addresses, given


class Plan:
    """Both passes; ``saved`` are the entries of the forward pass, and their layout, that the backward pass is given."""

    def __init__(self, recorder: Recorder, inputs: list[int], seed: int | None, out: Tensor, grads: list[Any]):
        memories, places = recorder.memories, []
        outputs: tuple[list[View | None], list[View | None]] = [], []
        for backward, results in ((False, [out]), (True, grads)):
            recorder.backward = backward
            outputs[backward].extend(None if x is None else recorder.view(x) for x in results)
            for view in outputs[backward]:
                memory = None if view is None else memories[view.memory]
                if memory and (memory.backward != backward or memory.kind in ("input", "constant")):
                    raise UnrecordableError("returns what it was given")
                if memory and memory.kind == "scratch":
                    memory.kind = "tensor"
            for saved in (False, True):
                places += self._one_allocation(recorder, backward, saved)
        for memory, arena, byte in places:
            memory.place = arena, byte
        self.forward = Pass(recorder, False, inputs, outputs[0])
        self.backward, self.saved, self.layouts = None, [], []
        if seed is not None:
            for i in inputs:  # without them a second derivative would pass for zero
                memories[i].saved |= memories[i].like.requires_grad
            kept = [i for i, m in enumerate(memories) if m.saved and m.kind not in ("constant", "scratch")]
            kept = [i for i in kept if i != seed]
            self.backward = Pass(recorder, True, [seed, *kept], outputs[1])
            self.saved = [self.forward.entries[i] for i in kept]
            likes = [memories[i].like for i in (seed, *kept)]
            self.layouts = [(x.shape, x.stride(), x.data_ptr() % 16) for x in likes]

    @staticmethod
    def _one_allocation(recorder: Recorder, backward: bool, saved: bool) -> list[tuple[Memory, int, int]]:
        """Puts the scratch of a pass, which the other one reads or not, into one tensor."""
        pieces = [m for m in recorder.memories if (m.kind, m.backward, m.saved) == ("scratch", backward, saved)]
        size, places = 0, []
        for memory in pieces:
            places.append((memory, len(recorder.memories), size))
            size += cdiv(memory.like.untyped_storage().nbytes(), ALIGNMENT) * ALIGNMENT
        if size > MOST_SCRATCH:
            raise UnrecordableError(f"takes {size} bytes of scratch")
        if pieces:
            arena = torch.empty(size, dtype=torch.uint8, device=recorder.memories[0].like.device)
            recorder.memories.append(Memory("tensor", arena, backward, saved, (len(recorder.memories), 0)))
        return places


def record(function: Callable[..., Tensor], values: list[Any], names: tuple[str, ...]) -> Plan:
    """The plan of a call, which is made on the very tensors, forward and backward.

    Raises:
        UnrecordableError: it cannot be repeated.
    """
    recorder, copies, inputs = Recorder(), dict[int, Tensor](), []
    for x in values:
        if isinstance(x, Tensor) and id(x) not in copies:
            leaf = x.detach()
            if recorder.memory_of(leaf) is not None:  # part of the storage of another one, which need not be so again
                leaf = _in_own_storage(leaf)
            copies[id(x)] = leaf.requires_grad_(x.requires_grad)
            inputs.append(recorder.add("input", copies[id(x)]))
    given = [copies.get(id(x), x) for x in values]
    with record_launches(recorder.launch), recorder:
        first = len(given) - len(names)
        out = function(*given[:first], **dict(zip(names, given[first:], strict=True)))
    leaves = [x for x in copies.values() if x.requires_grad]
    if not out.requires_grad:
        return Plan(recorder, inputs, None, out, [])
    recorder.backward = True
    ones = torch.ones_like(out)
    seed = recorder.add("input", ones)
    with record_launches(recorder.launch), recorder, torch.autograd.set_multithreading_enabled(False):
        found = iter(torch.autograd.grad(out, leaves, ones, allow_unused=True))
    grads = [next(found) if x.requires_grad else None for x in copies.values()]
    return Plan(recorder, inputs, seed, out, grads)


def _in_own_storage(x: Tensor) -> Tensor:
    """A copy with the strides and the alignment of x."""
    shift = x.data_ptr() % 16 // x.itemsize
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.new_empty(extent + shift).as_strided(x.shape, x.stride(), shift).copy_(x)


# ---- calls


def _with_layout(x: Tensor, layout: tuple[Any, ...]) -> Tensor:
    """x, or a copy laid out as the backward pass was recorded: gradients and unpacked tensors may come in any way."""
    shape, stride, alignment = layout
    if x.stride() == stride and x.shape == shape and x.data_ptr() % 16 == alignment:
        return x
    return torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def _function_of(name: str) -> Any:
    """The ``autograd.Function`` of a loss."""

    def forward(ctx: Any, plan: Plan, *given: Tensor) -> Tensor | None:
        tensors, (out,) = plan.forward(given)
        ctx.plan = plan
        ctx.save_for_backward(*[tensors[i] for i in plan.saved])
        return out

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(name, grad)
        plan = ctx.plan
        given = [_with_layout(x, y) for x, y in zip((grad, *ctx.saved_tensors), plan.layouts, strict=True)]
        return None, *plan.backward(given)[1]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once(backward, name))}
    return type(name, (torch.autograd.Function,), methods)


def replayed(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Replays the plain eager calls of a loss that takes the Triton path; see the module."""
    plans: dict[Any, Plan | int] = {}
    apply = _function_of(function.__name__).apply

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first: Any = args[0] if args else None
        if type(first) not in PLAIN or torch.compiler.is_compiling() or not gpu.use_triton(first) or not ENABLED:
            return function(*args, **kwargs)
        values = [*args, *kwargs.values()]
        key = _key(first, values, kwargs)
        if key is None:
            return function(*args, **kwargs)
        plan = plans.get(key, 0)
        if plan == 1:
            try:
                plan = record(function, values, tuple(kwargs))
            except UnrecordableError:
                plan = 2
            plans[key] = plan
        if not isinstance(plan, Plan):  # new, or 2: cannot be recorded
            if plan == 0:
                if len(plans) >= MOST_PLANS:
                    plans.pop(next(iter(plans)), None)
                plans[key] = 1
            return function(*args, **kwargs)
        given = [x for x in values if isinstance(x, Tensor)]
        if len({*map(id, given)}) < len(given):
            given = list({id(x): x for x in given}.values())
        out: Any = apply(plan, *given) if plan.backward else plan.forward(given)[1][0]
        return out

    return call


def _key(first: Tensor, values: list[Any], names: Any) -> Any:
    """All that the course of a call depends on; None where it must not be replayed."""
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or torch.is_inference_mode_enabled():
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:  # checkpoints count what is saved
        return None
    if torch._C._get_tracing_state() is not None or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    parts: list[Any] = [torch.is_grad_enabled(), matmul_precision(), active_driver(), *names]
    if autocast_enabled(first):
        parts.append(torch.get_autocast_dtype(first.device.type))
    seen: list[int] = []
    for x in values:
        if isinstance(x, Tensor):
            if type(x) not in PLAIN or x.is_meta or x.layout is not torch.strided:
                return None
            if id(x) in seen:
                parts.append(seen.index(id(x)))
            parts.append((x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.data_ptr() % 16))
            seen.append(id(x))
        else:
            parts.append((type(x), x))
    try:
        key = tuple(parts)
        hash(key)
    except TypeError:  # a wrong argument
        return None
    return key
