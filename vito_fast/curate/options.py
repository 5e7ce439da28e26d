"""Options of curation, one frozen dataclass a step. A step is computed again if its options, or those of a step before
it, change; nothing else is."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

from vito_fast.curate.balance import BalanceOptions
from vito_fast.curate.duplicates import DuplicateOptions
from vito_fast.data.store.description import Limits


def check(options: Any, **rules: tuple[bool, str]) -> None:
    """Raises ValueError naming the first option whose rule is broken."""
    for name, (good, rule) in rules.items():
        if not good:
            raise ValueError(f"{name} is {getattr(options, name)!r}, must be {rule}")


@dataclass(frozen=True)
class AnalyseOptions:
    """The one decode of each file."""

    clip_length: float = 10.0
    """Seconds at which a shot is split."""
    first_frames: int = 100
    """Frames at the beginning of a clip that the classifier may see."""
    stride: int = 4
    """One frame of so many of the file is classified."""
    frame_size: int = 224
    """Side in pixels of the frames kept for the classifier."""
    hash_rate: float = 6.0
    """Frames a second that are hashed; every third is searched, all are searched for."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check(
            self,
            clip_length=(0 < self.clip_length < math.inf, "above 0"),
            first_frames=(self.first_frames >= 1, "at least 1"),
            stride=(self.stride >= 1, "at least 1"),
            frame_size=(32 <= self.frame_size <= 1024, "32 to 1024"),
            hash_rate=(0 < self.hash_rate <= 60, "above 0, at most 60"),
        )


@dataclass(frozen=True)
class ClassifyOptions:
    """The classifier: ``auto`` is the offline default; or an ONNX file, or a timm or torchvision model."""

    model: str = "auto"
    """auto, FILE.onnx, timm:NAME or torchvision:NAME."""
    weights: str = ""
    """Weight file of a timm or torchvision model: .safetensors, or .pth read with weights_only."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class DecideOptions:
    """When a clip shows its query. See :meth:`preset`."""

    min_length: float = 10.0
    """Seconds; shorter clips are dropped."""
    hits: int = 1
    """Least frames whose top-1 class is one of the query's."""
    probability: float = 0.0
    """Least probability of the top-1 class of such a frame."""
    free_share: float = 0.5
    """Without a query: least share of the frames with the clip's class as top-1."""
    free_probability: float = 0.3
    """Without a query: least probability of the top-1 class of such a frame."""
    flat_share: float = 0.5
    """Clips with a larger share of flat frames are dropped."""

    def __post_init__(self) -> None:
        check(
            self,
            min_length=(0 <= self.min_length < math.inf, "at least 0"),
            hits=(self.hits >= 1, "at least 1"),
            probability=(0 <= self.probability <= 1, "0 to 1"),
            free_share=(0 < self.free_share <= 1, "above 0, at most 1"),
            free_probability=(0 <= self.free_probability <= 1, "0 to 1"),
            flat_share=(0 <= self.flat_share <= 1, "0 to 1"),
        )

    @classmethod
    def preset(cls, name: str) -> "DecideOptions":
        """``videonet``: one top-1 hit, clips of 10 s, as published. ``strict``: two hits with p >= .2, clips of 1 s."""
        presets = {"videonet": cls(), "strict": cls(min_length=1.0, hits=2, probability=0.2)}
        if name not in presets:
            raise ValueError(f"preset is {name!r}, must be {' or '.join(presets)}")
        return presets[name]


@dataclass(frozen=True)
class CurateOptions:
    analyse: AnalyseOptions = field(default_factory=AnalyseOptions)
    classify: ClassifyOptions = field(default_factory=ClassifyOptions)
    decide: DecideOptions = field(default_factory=DecideOptions)
    duplicates: DuplicateOptions = field(default_factory=DuplicateOptions)
    balance: BalanceOptions = field(default_factory=BalanceOptions)
    near: str = "group"
    """drop: only a group's representative stays. group: members stay and become one video of the store."""

    def __post_init__(self) -> None:
        check(self, near=(self.near in ("drop", "group"), "drop or group"))


def digest(*parts: Any) -> str:
    """Hash of options, names and numbers; equal for equal values."""
    plain = json.dumps(parts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
