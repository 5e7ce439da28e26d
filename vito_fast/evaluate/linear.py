"""A linear classifier on frozen features: multinomial logistic regression, solved by L-BFGS.

The objective is convex, so the result depends on the data and the regularization alone; there is no learning rate and
no epoch to tune. The regularization is chosen on a part of the training set. Trap: a value chosen on the test set
makes every encoder look better, and some more than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.files import atomic_write

STRENGTHS = tuple(10.0**e for e in range(-6, 1))
"""Regularizations to choose from."""
CHUNK = 1 << 16
"""Examples at a time: bounds the memory of logits."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier.

    Args:
        weight: (classes, D) float32, for features as they come.
        bias: (classes,) float32.
        l2: the regularization.
    """

    weight: Tensor
    bias: Tensor
    l2: float

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, classes) float32."""
        return F.linear(features.float(), self.weight.to(features.device), self.bias.to(features.device))

    def save(self, path: Path, **notes: str) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        with atomic_write(path) as partial:
            save_file(tensors, partial, {"l2": repr(self.l2), **notes})


def load_probe(path: Path) -> tuple[LinearProbe, dict[str, str]]:
    """A saved classifier and its notes. UserError naming the file if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = dict(file.metadata() or {})
            return LinearProbe(file.get_tensor("weight"), file.get_tensor("bias"), float(notes.pop("l2"))), notes
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"cannot read the classifier {path}: {error}") from None


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    l2: float = 1e-3,
    start: LinearProbe | None = None,
    steps: int = 500,
) -> LinearProbe:
    """Minimizes mean cross-entropy + l2 / 2 x the squared norm of the weights on standardized features.

    Standardized: each feature minus its mean, over its deviation, on the training set; the classifier that is returned
    takes features as they come. The bias is not regularized. Float64 on a CPU, float32 on a GPU.

    Args:
        features: (N, D).
        labels: (N,) integers below ``classes``.
        classes: number of classes.
        l2: regularization, positive so that the minimum exists.
        start: a classifier to start from, as that of a neighboring ``l2``. The minimum does not depend on it.
        steps: of L-BFGS at most.

    Raises:
        ValueError: for shapes that do not fit, a label that is no class, or l2 not positive.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"features must be (N, D) and labels (N,), not {tuple(features.shape)}, {tuple(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels are {int(labels.min())} to {int(labels.max())}, there are {classes} classes")
    if l2 <= 0:
        raise ValueError(f"l2 must be positive, not {l2}")
    dtype = torch.float64 if features.device.type == "cpu" else torch.float32
    mean = features.mean(0, dtype=dtype)
    deviation = features.to(dtype).std(0, correction=0).clamp_min(1e-6)
    parameters = torch.zeros(classes, features.shape[1] + 1, dtype=dtype, device=features.device)
    if start is not None:
        parameters[:, :-1] = start.weight.to(parameters) * deviation
        parameters[:, -1] = start.bias.to(parameters) + start.weight.to(parameters) @ mean
    parameters.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=steps,
        max_eval=2 * steps,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        total = l2 / 2 * parameters[:, :-1].square().sum()
        total.backward()
        for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            inputs = (x.to(dtype) - mean) / deviation
            logits = F.linear(inputs, parameters[:, :-1], parameters[:, -1])
            part = F.cross_entropy(logits, y.long(), reduction="sum") / len(labels)
            part.backward()
            total = total.detach() + part.detach()
        return total

    with torch.enable_grad():
        solver.step(objective)
    found = parameters.detach()
    weight = found[:, :-1] / deviation
    return LinearProbe(weight.float(), (found[:, -1] - weight @ mean).float(), l2)


def choose_l2(
    features: Tensor, labels: Tensor, classes: int, *, strengths: Sequence[float] = STRENGTHS, share: float = 0.2
) -> tuple[float, dict[float, float]]:
    """The regularization with the best accuracy on a held-out share of the training set.

    Of each class the last ``share``, in the given order, is held out: neighbors in a list, as cuts of one video, stay
    together. Of equal accuracies the stronger regularization wins.

    Returns:
        The choice, and the held-out accuracy of each.
    """
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for number in range(classes):
        own = (labels == number).nonzero().flatten()
        held[own[len(own) - int(len(own) * share) :]] = True
    if not held.any() or held.all():
        raise ValueError(f"no share of {share} can be held out of {len(labels)} examples")
    accuracies: dict[float, float] = {}
    probe: LinearProbe | None = None
    for l2 in sorted(strengths, reverse=True):
        probe = fit(features[~held], labels[~held], classes, l2=l2, start=probe)
        right = probe.logits(features[held]).argmax(1) == labels[held]
        accuracies[l2] = float(right.double().mean())
    return max(accuracies, key=lambda l2: (accuracies[l2], l2)), accuracies
