"""Likeness to human decisions: shape bias and error consistency.

Sources: Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (2019), for shape bias on cue-conflict
images; Geirhos et al., "Beyond accuracy" (2020), for error consistency, which is Cohen's kappa of right and wrong.
Traps: only decisions for the shape or the texture count, so the bias says nothing of how often either is right; an
image whose two cues agree is no conflict; kappa is 1 where both observers are always right.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MEMBERS: dict[str, list[int]] = {
    "airplane": [404],
    "bear": [294, 295, 296, 297],
    "bicycle": [444, 671],
    "bird": [8, *range(10, 17), 18, 19, 20, 22, 23, 24, 80, 81, 82, 83, *range(87, 97), 98, 99, 100, *range(127, 134),
             *range(135, 146)],
    "boat": [472, 554, 625, 814, 914],
    "bottle": [440, 720, 737, 898, 899, 901, 907],
    "car": [436, 511, 817],
    "cat": [281, 282, 283, 284, 285, 286],
    "chair": [423, 559, 765, 857],
    "clock": [409, 530, 892],
    "dog": [*range(152, 192), *range(193, 204), *range(205, 227), *range(228, 242), *range(243, 251), *range(252, 258),
            259, 261, 262, 263, 265, 266, 267, 268],
    "elephant": [385, 386],
    "keyboard": [508, 878],
    "knife": [499],
    "oven": [766],
    "truck": [555, 569, 656, 675, 717, 734, 864, 867],
}  # fmt: skip
"""The 16 classes and their ImageNet classes by number, as the official comparison has them."""


def shape_bias(responses: Sequence[Hashable], shapes: Sequence[Hashable], textures: Sequence[Hashable]) -> float:
    """The fraction of shape decisions among shape and texture decisions. NaN without any.

    Args:
        responses: the class chosen for each image.
        shapes: the class of its shape.
        textures: the class of its texture. Images with shape == texture are left out.
    """
    triples = list(zip(responses, shapes, textures, strict=True))
    by_shape = sum(response == shape != texture for response, shape, texture in triples)
    by_texture = sum(response == texture != shape for response, shape, texture in triples)
    return by_shape / (by_shape + by_texture) if by_shape + by_texture else float("nan")


def error_consistency(first: ArrayLike, second: ArrayLike) -> float:
    """Cohen's kappa of two observers' correctness on the same images.

    (observed - expected) / (1 - expected) agreement, where independent observers of the same accuracies are expected
    to agree by chance. 1 if chance agreement is certain, as of two observers that are always right.

    Args:
        first: (N,) booleans, right or wrong.
        second: likewise, in the same order.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"two lists of one length, at least 1, not {a.shape} and {b.shape}")
    a, b = a.astype(bool), b.astype(bool)
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    # Exact counts decide the degenerate case: the means of floats need not.
    if (a.all() and b.all()) or not (a.any() or b.any()):
        return 1.0
    return float(((a == b).mean() - expected) / (1 - expected))


def mean_error_consistency(
    observer: Mapping[str, NDArray[np.bool_]], humans: Mapping[str, Sequence[NDArray[np.bool_]]]
) -> float:
    """The mean kappa of an observer with each human in each condition; conditions have the same weight.

    Args:
        observer: correctness by condition.
        humans: by condition, the correctness of each human on the same images.
    """
    means = [np.mean([error_consistency(observer[name], human) for human in humans[name]]) for name in observer]
    return float(np.mean(means))


def to_16_classes(probabilities: NDArray, members: Mapping[str, Sequence[int]] = MEMBERS) -> list[str]:
    """Decisions among a few classes from probabilities over many.

    Each class takes the mean probability of its members, as the official comparison does.

    Args:
        probabilities: (N, 1000).
        members: ImageNet class indices of each class.
    """
    names = list(members)
    means = np.stack([np.asarray(probabilities)[:, list(members[name])].mean(1) for name in names], 1)
    return [names[i] for i in means.argmax(1)]
