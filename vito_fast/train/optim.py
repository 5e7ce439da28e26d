"""LARS, AdamW, and the schedules of learning rate and target average: pure functions of the step.

LARS as in the BYOL code: weight decay is added to the gradient. The sum is scaled by eta |w|/|g + wd w|, with the trust
coefficient eta. Momentum accumulates it, and the learning rate multiplies the momentum. Parameters with fewer than two
dimensions (biases, norms) skip weight decay and trust ratio. On a GPU, float32 parameters take the two launches of
``vito_kernels.lars``.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vito_fast.config import Config, OptimizerConfig, ScheduleConfig
from vito_fast.errors import UserError
from vito_kernels.lars import FusedLars

Optimizer = Any
"""``Lars`` or ``AdamW``: gradient_norm, clip, step(lr, finite), state_dict, load_state_dict."""

CHUNK = 1 << 20  # elements of a chunk on the CPU, unless one parameter has more


def build_optimizer(online: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configuration's optimizer of a branch."""
    return AdamW(online, config) if config.name == "adamw" else Lars(online.named_parameters(), config)


class Gradients:
    """The gradients of named parameters, in multi-tensor calls; nothing waits for the device."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.named = named

    def gradients(self) -> list[Tensor]:
        """The parameters' gradients; a parameter without one gets zeros."""
        for _, p in self.named:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for _, p in self.named if p.grad is not None]

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients, ()."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients())))

    @torch.no_grad()
    def clip(self, norm: Tensor, most: float) -> None:
        """Scales all gradients, of Euclidean norm ``norm``, so that it is at most ``most``."""
        gradients = self.gradients()
        torch._foreach_mul_(gradients, (most / norm.clamp(min=most)).to(gradients[0].dtype))


class AdamW(Gradients):
    """torch's fused AdamW, by parameter name, with skipped steps and a learning rate for each layer.

    Args:
        online: The branch. Its backbone's layers have rates ``layer_decay ** layers after them``; pools and heads
            have the whole rate.
        config: Its constants.
    """

    def __init__(self, online: nn.Module, config: OptimizerConfig) -> None:
        super().__init__([(name, p) for name, p in online.named_parameters() if p.requires_grad])
        scales = layer_scales(online.backbone, config.layer_decay) if config.layer_decay < 1 else {}  # type: ignore[arg-type]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.named:
            decay = config.weight_decay if p.dim() > 1 else 0.0
            groups.setdefault((scales.get(name.removeprefix("backbone."), 1.0), decay), []).append(p)
        given = [{"params": ps, "weight_decay": decay, "scale": scale} for (scale, decay), ps in groups.items()]
        self._adam = torch.optim.AdamW(given, lr=0.0, betas=config.betas, fused=True)
        for _, p in self.named:  # as torch would at the first step, so that the state is there to be loaded
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self._adam.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor | None = None) -> None:
        """Updates the parameters once; as ``Lars.step``."""
        self.gradients()
        for group in self._adam.param_groups:
            group["lr"] = lr * group["scale"]
        adam: Any = self._adam
        adam.grad_scale, adam.found_inf = None, None if finite is None else (~finite).float()
        adam.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Both averages and the count of steps, by parameter name."""
        return {f"{name}.{key}": value for name, p in self.named for key, value in self._adam.state[p].items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies the averages in; ValueError if the names are not exactly this optimizer's."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"momentum of other parameters: {sorted(state.keys() ^ own.keys())[:3]} ...")
        for name, buffer in own.items():
            buffer.copy_(state[name])


def layer_scales(backbone: nn.Module, decay: float) -> dict[str, float]:
    """The share of the learning rate of each parameter of a backbone, by timm's division into layers."""
    try:
        from timm.optim import param_groups_layer_decay
    except ImportError:
        raise UserError("optimizer.layer_decay needs timm: pip install timm") from None
    body: nn.Module = getattr(backbone, "body", backbone)
    prefix = "body." if body is not backbone else ""
    names = {id(p): f"{prefix}{name}" for name, p in body.named_parameters()}
    groups: list[Any] = param_groups_layer_decay(body, layer_decay=decay)
    largest = max(group["lr_scale"] for group in groups)
    return {names[id(p)]: group["lr_scale"] / largest for group in groups for p in group["params"]}


class Lars(Gradients):
    """LARS with one momentum buffer per parameter, in multi-tensor calls; nothing waits for the device. Deterministic.

    Args:
        named_parameters: Parameters by name; those without ``requires_grad`` are left out.
        config: Its constants.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.config = config
        self.adapted = [(name, p) for name, p in named if p.dim() > 1]
        self.plain = [(name, p) for name, p in named if p.dim() <= 1]
        super().__init__(self.adapted + self.plain)
        self.momentum = {name: torch.zeros_like(p) for name, p in self.adapted + self.plain}
        self.chunks = _chunks(self.parameters)
        self.fused = FusedLars(len(self.adapted), config.momentum, config.weight_decay, config.trust_coefficient)

    @property
    def parameters(self) -> list[Tensor]:
        return [p.detach() for _, p in self.adapted + self.plain]

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor | None = None) -> None:
        """Updates the parameters once, and may overwrite the gradients.

        Args:
            lr: Learning rate.
            finite: Bool tensor (). False leaves parameters and momentum exactly as they were, even if the gradients are
                not finite.
        """
        gradients, momentum, weights = self.gradients(), list(self.momentum.values()), self.parameters
        if self.fused.step(weights, gradients, momentum, lr, finite):
            return
        for chunk in self.chunks:
            adapted = max(0, len(self.adapted) - chunk.start)
            self._step(weights[chunk], gradients[chunk], momentum[chunk], adapted, lr, finite)

    def _step(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        momentum: list[Tensor],
        adapted: int,
        lr: float,
        finite: Tensor | None,
    ) -> None:
        """Updates one chunk; its first ``adapted`` parameters have weight decay and trust ratio."""
        keep: Any = self.config.momentum
        if finite is not None:
            bits = torch.int64 if gradients[0].dtype == torch.float64 else torch.int32
            torch._foreach_mul_([g.view(bits) for g in gradients], finite.to(bits))
            # Scalars of the tensors' own dtype: with any other, multi-tensor calls launch a kernel for each tensor.
            usable = finite.to(gradients[0].dtype)
            keep = keep * usable + (1 - usable)
        self._adapt(weights[:adapted], gradients[:adapted], finite)
        torch._foreach_mul_(momentum, keep)
        torch._foreach_add_(momentum, gradients)
        if finite is None:
            torch._foreach_add_(weights, momentum, alpha=-lr)
        else:
            torch._foreach_add_(weights, torch._foreach_mul(momentum, (-lr * usable).to(usable.dtype)))

    def _adapt(self, weights: list[Tensor], gradients: list[Tensor], finite: Tensor | None) -> None:
        """Weight decay and trust ratio, in place on the gradients."""
        if not gradients:
            return
        torch._foreach_add_(gradients, weights, alpha=self.config.weight_decay)
        weight_norm = torch.stack(torch._foreach_norm(weights))
        update_norm = torch.stack(torch._foreach_norm(gradients))
        usable = (weight_norm > 0) & (update_norm > 0)
        ratio = torch.where(usable, self.config.trust_coefficient * weight_norm / update_norm, 1.0)
        if finite is not None:
            ratio = torch.where(finite, ratio, 0.0)
        torch._foreach_mul_(gradients, list(ratio.unbind()))

    def state_dict(self) -> dict[str, Tensor]:
        """Momentum by parameter name."""
        return dict(self.momentum)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies momentum in; ValueError if the names are not exactly this optimizer's."""
        if state.keys() != self.momentum.keys():
            raise ValueError(f"momentum of other parameters: {sorted(state.keys() ^ self.momentum.keys())[:3]} ...")
        for name, buffer in self.momentum.items():
            buffer.copy_(state[name])


def _chunks(tensors: list[Tensor]) -> list[slice]:
    """Splits the parameters: one chunk on a GPU; on a CPU, chunks that stay in its cache between calls."""
    chunks, start, size = [], 0, 0
    for i, tensor in enumerate(tensors):
        if size and tensor.device.type == "cpu" and size + tensor.numel() > CHUNK:
            chunks.append(slice(start, i))
            start, size = i, 0
        size += tensor.numel()
    return [*chunks, slice(start, len(tensors))]


class Schedule:
    """Learning rate and target average at each step of a run with ``steps_per_epoch`` steps an epoch."""

    def __init__(self, config: Config, steps_per_epoch: float) -> None:
        schedule: ScheduleConfig = config.schedule
        self.steps_per_epoch = steps_per_epoch
        self.peak = config.optimizer.base_lr * config.train.batch_size / 256
        self.total_steps = max(1, round(schedule.epochs * steps_per_epoch))
        self.warmup_steps = min(round(schedule.warmup_epochs * steps_per_epoch), self.total_steps)
        self.base_ema = schedule.base_ema

    def learning_rate(self, step: int) -> float:
        """Linear from 0 over the warm-up, then cosine from the peak to 0; ``step`` counts from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def tau(self, step: int) -> float:
        """1 - (1 - tau_0)(cos(pi k/K) + 1)/2: from base_ema at the start to 1 at the end."""
        return 1 - (1 - self.base_ema) * (math.cos(math.pi * min(step / self.total_steps, 1.0)) + 1) / 2
