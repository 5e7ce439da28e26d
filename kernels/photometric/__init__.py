"""Color augmentation of a batch in one pass."""

from .op import IMAGENET_MEAN, IMAGENET_STD, PARAMS, photometric

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PARAMS", "photometric"]
