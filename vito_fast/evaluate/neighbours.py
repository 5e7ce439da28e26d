"""k nearest neighbors: the class of an image by the classes of the most similar training images.

Source: the weighted vote of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(2018), as DINO evaluates it: each neighbor votes with exp(cosine similarity / temperature). Traps: k is no parameter to
tune on test; the published runs state k = 20 and temperature .07 for DINO, k = 200 and .1 for earlier work.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 26
"""Similarities at a time: 256 MiB of float32."""


def votes(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
) -> Tensor:
    """The weight of each class among the neighbors of each query.

    Args:
        train: features (N, D), any floating dtype; scaled to unit length here.
        labels: (N,) integers from 0.
        queries: features (Q, D).
        k: neighbors; all of N if it is less.
        temperature: of the votes.
        classes: number of classes, by default the largest label and one.

    Returns:
        (Q, classes) float32, each row's sum 1. Deterministic on a CPU.

    Raises:
        ValueError: for shapes that do not fit, or k or temperature not positive.
    """
    if train.ndim != 2 or queries.ndim != 2 or train.shape[1] != queries.shape[1] or labels.shape != train.shape[:1]:
        shapes = f"{tuple(train.shape)}, {tuple(labels.shape)} and {tuple(queries.shape)}"
        raise ValueError(f"train, labels and queries must be (N, D), (N,) and (Q, D), not {shapes}")
    if k < 1 or temperature <= 0 or not len(train):
        raise ValueError(f"k, temperature and N must be positive, not {k}, {temperature} and {len(train)}")
    classes = int(labels.max()) + 1 if classes is None else classes
    train = F.normalize(train.float(), dim=1)
    found = []
    for part in queries.split(max(1, CHUNK // len(train))):
        similarity, index = (F.normalize(part.float(), dim=1) @ train.T).topk(min(k, len(train)), 1)
        # A softmax, not a bare exponential: the order is the same and small temperatures do not overflow.
        weights = (similarity / temperature).softmax(1)
        found.append(weights.new_zeros(len(part), classes).scatter_add_(1, labels[index].long(), weights))
    return torch.cat(found) if found else train.new_zeros(0, classes)


def knn(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
) -> Tensor:
    """Predicted labels (Q,) int64, by :func:`votes`, which has the same arguments."""
    return votes(train, labels, queries, k=k, temperature=temperature, classes=classes).argmax(1)
