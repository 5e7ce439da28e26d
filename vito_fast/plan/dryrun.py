"""The CUDA training step without CUDA: its arithmetic, traffic and memory, and its problems.

The trainer's own step (train/trainer.py) runs once on tensors without data (op_counter.py): keys, queries, loss,
backward, optimizer, moving average. A tensor on the wrong device, a wait for the host or a break in the compiled graph
shows here in seconds, without a rented GPU.
"""

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_fast.config import Config
from vito_fast.model import VitoModel
from vito_fast.model.norm import set_batch_norms
from vito_fast.plan.hardware import arithmetic_peak
from vito_fast.plan.op_counter import Op, OpCounter, Problem, fake_cuda, to_fake_cuda, total
from vito_fast.train import trainer
from vito_fast.train.distributed import World, environment_number
from vito_fast.train.keys import GatheredKeys
from vito_fast.train.optim import Lars

GPU = World(rank=0, size=1, local_size=1, device=torch.device("cuda", 0))


@dataclass(frozen=True)
class DryRun:
    """One rank's step, counted. Bytes of memory are allocated bytes: a caching allocator holds some more."""

    clips: int
    """Clips of this rank in a step."""
    world: int
    ops: Counter[Op]
    peak: dict[str, int]
    """Bytes alive at the peak, by owner."""
    peak_phase: str
    saved: dict[str, int]
    """Bytes of activations saved for the backward pass, by part of the model."""
    parameters: int
    """Learned parameters of the online branch."""
    gradient_bytes: int
    norms: int
    """Batch norms of the online branch and the target together."""
    key_bytes: int
    """Bytes of keys that a rank contributes to the gather."""
    problems: tuple[str, ...]
    """Each problem and its place; empty for a step that runs."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def total(self, phase: str = "", kind: str = "") -> tuple[float, float]:
        """(flops, bytes) of one phase and one kind of op (default: all)."""
        return total(self.ops, phase, kind)


def dry_run(config: Config, *, clips: int | None = None, world: int = 1) -> DryRun:
    """Counts one CUDA step of one rank. Deterministic; needs neither GPU nor store.

    The step ends at the first problem, and so do the counts. ``train.compile`` adds the search for graph breaks.

    Args:
        config: The run.
        clips: Clips of the rank; by default its share of the batch.
        world: Number of ranks.

    Raises:
        UserError: a model that cannot be built, or a batch that does not divide among the ranks.
    """
    clips = clips or config.train.clips(world)
    lars = replace(config.optimizer, name="lars", layer_decay=1.0)  # AdamW counts as LARS: one pass, a buffer less
    train = replace(config.train, compile=False, cuda_graphs=False, device="cuda")
    eager = replace(config, train=train, optimizer=lars)
    breaks = graph_breaks(config, world) if config.train.compile else []
    counter, problems = OpCounter(), []
    with torch.device("meta"):
        model = _Fake(config.model)
    with fake_cuda(), _instead(counter, model, clips, world), counter:
        with counter.in_phase("parameters"):
            counted = _Counted(eager, GPU, 1)
            counted.counter = counter
        for tensor in (*counted.model.target.parameters(), *counted.model.target.buffers()):
            counter.own(tensor, "target")
        for tensor in counted.optimizer.momentum.values():
            counter.own(tensor, "optimizer state")
        try:
            with counter.in_phase("images"):
                views, video = _batch(config, clips)
            with counter.in_phase("guards"):
                counted.step(views, video, measure=False)
        except (Problem, RuntimeError, NotImplementedError) as error:
            problems.append(f"{_explain(error)} [{_place(error)}]")
        learned = [p for p in counted.model.online.parameters() if p.requires_grad]
        return DryRun(
            clips=clips,
            world=world,
            ops=counter.ops,
            peak={owner: size for owner, size in counter.peak.most_common() if size},
            peak_phase=counter.peak_phase,
            saved={owner: size for owner, size in counter.saved.most_common() if size},
            parameters=sum(p.numel() for p in learned),
            gradient_bytes=sum(p.numel() * p.element_size() for p in learned),
            norms=sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in counted.model.modules()),
            key_bytes=config.sampler.views * clips * config.model.projector_out * 4 * config.model.embeddings,
            problems=tuple(problems + breaks),
        )


def model_flops(config: Config, clips: int, world: int) -> float | None:
    """Arithmetic of one rank's step on ``clips`` clips, as MFU counts it.

    Work that micro-batches and recomputed activations repeat to save memory is left out. Takes some seconds; leaves
    the random state as it was.

    Returns:
        Flops; None for a step with a problem.
    """
    plain = replace(
        config,
        model=replace(config.model, checkpoint_activations=False),
        train=replace(config.train, micro_batches=1, compile=False, cuda_graphs=False),
    )
    with torch.random.fork_rng(devices=[]):
        dry = dry_run(plain, clips=clips, world=world)
    return None if dry.problems else dry.total()[0]


def clips_at_peak(config: Config) -> float | None:
    """The rate at which a run on the GPUs here would use all of their peak arithmetic (an MFU of 1).

    Reads the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK).

    Returns:
        Clips a second over all ranks; None without a GPU of known peak, or on another rank than the first.
    """
    if config.train.device == "cpu" or not torch.cuda.is_available() or os.environ.get("RANK", "0") != "0":
        return None
    peak = arithmetic_peak(torch.cuda.get_device_name(), config.train.dtype)
    if peak is None:
        return None
    world = environment_number("WORLD_SIZE", 1, least=1)
    clips = config.train.clips(world)
    flops = model_flops(config, clips, world)
    return peak * world * clips / flops if flops else None


def graph_breaks(config: Config, world: int = 1) -> list[str]:
    """Finds the first graph break of ``torch.compile`` in each compiled part of the step, one line each.

    The parts are both branches' forwards and the target's average. With several ranks they hold the batch norms'
    collectives.
    """
    with torch.device("meta"):
        model = VitoModel(config.model)
    groups = config.sampler.views if config.model.batch_norm == "per_view" else 1
    if groups > 1 or world > 1:
        set_batch_norms(model, groups=groups, sync=world > 1)
    makeshift = world > 1 and not dist.is_initialized()  # a collective cannot be traced without a group
    if makeshift:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _graph_breaks(config, model)
    finally:
        if makeshift:
            dist.destroy_process_group()


def _graph_breaks(config: Config, model: VitoModel) -> list[str]:
    found = []
    dtype, size = trainer.WEIGHTS[config.train.dtype], config.sampler.size
    with fake_cuda():
        to_fake_cuda(model, dtype)
        many = 2 * config.sampler.views
        images = (torch.empty(many, 3, size, size, dtype=dtype, device="cuda:0"),)
        many, size = many * config.sampler.small_crops, config.sampler.small_size
        small = (torch.empty(many, 3, size, size, dtype=dtype, device="cuda:0"),) if many else ()
        rate = (
            torch.empty((), dtype=torch.float64, device="cuda:0"),
            torch.empty((), dtype=torch.bool, device="cuda:0"),
        )
        for name, part, given, narrow in (
            ("online branch", model.online, (*images, *small), config.train.dtype == "bfloat16"),
            ("target branch", model.target, images, config.train.dtype == "bfloat16"),
            ("target's average", model.update_target, rate, False),
        ):
            torch._dynamo.reset()
            try:
                with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
                    torch.compile(part, backend="eager", fullgraph=True)(*given)
            except torch._dynamo.exc.TorchDynamoException as error:
                found.append(f"graph break in the {name}: {' '.join(str(error).split())}")
    torch._dynamo.reset()
    return found


class _Counted(trainer.Trainer):
    """The trainer with its forwards in their phases."""

    counter: OpCounter

    def _forward(self, branch: nn.Module, views: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        phase = "target"
        if branch is self.online:
            phase = "online" if torch.is_grad_enabled() else "online, first pass"
        with self.counter.in_phase(phase), self.counter.saving(), self.counter.watch(branch, _owner):
            return super()._forward(branch, views)


class _Gathered:
    """Keys of all ranks without ranks: this one's clips come first."""

    def __init__(self, counter: OpCounter, total: int, embeddings: list[Tensor], video: Tensor) -> None:
        with counter.in_phase("keys"):
            every = [k.new_empty(len(k), total, k.shape[-1]) for k in embeddings]
            self.keys = GatheredKeys(every, video.new_empty(total), 0)

    def wait(self) -> GatheredKeys:
        return self.keys


class _Fake(VitoModel):
    """Built on ``meta``; ``to`` the GPU gives it fake tensors."""

    def to(self, *args: Any, **kwargs: Any) -> "_Fake":
        dtype = next((a for a in args if isinstance(a, torch.dtype)), None)
        to_fake_cuda(self, dtype, kwargs.get("memory_format"))
        return self


@contextmanager
def _instead(counter: OpCounter, model: VitoModel, clips: int, world: int) -> Iterator[None]:
    """Inside, the trainer's step uses stand-ins for calls that need a driver, each in its phase."""

    def in_phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with counter.in_phase(name), counter.saving():
                return function(*args, **kwargs)

        return call

    def backward(roots: Tensor | list[Tensor], gradients: list[Tensor] | None = None) -> None:
        roots = [roots] if isinstance(roots, Tensor) else list(roots)
        with counter.in_phase("backward"):
            counter.backward(*zip(roots, gradients or [torch.ones_like(r) for r in roots], strict=True))

    def gathered(embeddings: list[Tensor], video: Tensor, _: World, __: int | None) -> _Gathered:
        return _Gathered(counter, clips * world, embeddings, video)

    lars = Lars
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (trainer, "VitoModel", lambda _: model),
            (trainer, "PendingKeys", gathered),
            (trainer, "objective", in_phase("loss", trainer.objective)),
            (lars, "gradient_norm", in_phase("optimizer", lars.gradient_norm)),
            (lars, "step", in_phase("optimizer", lars.step)),
            (VitoModel, "update_target", in_phase("average", VitoModel.update_target)),
            (Tensor, "backward", backward),
            (torch.autograd, "backward", backward),
            (torch.autograd, "grad", in_phase("loss, backward", counter.gradients)),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def _batch(config: Config, clips: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A batch as the loader makes it: views (B,3,S,S) channels-last, and the videos' numbers (B,)."""
    shape = (clips, 3, config.sampler.size, config.sampler.size)
    dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
    new = lambda: torch.empty(shape, dtype=dtype, device="cuda:0", memory_format=torch.channels_last)  # noqa: E731
    return tuple(new() for _ in range(config.sampler.views)), torch.empty(clips, dtype=torch.int64, device="cuda:0")


def _owner(name: str) -> str:
    """The owner of a module's allocations: the stage of the backbone, or the head."""
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "backbone" else pieces[0]


def _explain(error: Exception) -> str:
    message = " ".join(str(error).split())
    name = type(error).__name__
    if name in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return f"the host waits for the GPU: {message} needs a value, not only a shape"
    if "two different devices" in message or "is on cpu" in message:
        return f"device mismatch: {message}"
    return message if isinstance(error, Problem) else f"{name}: {message}"


def _place(error: Exception) -> str:
    """File and line of the innermost frame outside torch and the counter."""
    counter = tuple(str(Path(__file__).with_name(name)) for name in ("op_counter.py", "dryrun.py"))
    library = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((library, *counter))]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "unknown"
