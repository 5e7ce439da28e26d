"""Configuration: frozen dataclasses, strict YAML, and where each default comes from.

Provenance words in the field docstrings:

*paper*     stated in the text of VITO (arXiv 2210.06433), ICLR 2023 version, with its appendix
*rebuttal*  stated by its authors in the public discussion of that version
*ancestor*  exact, from the public code of BYOL and DetCon, which the paper follows
*ours*      stated nowhere; this project's choice
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vito_fast.errors import UserError

MAX_VIEWS = 4
"""Views of a clip at most."""


@dataclass(frozen=True)
class ClipFilter:
    """Which clips of a store to take: those that pass every field. One entry of a field is enough to pass it."""

    labels: tuple[str, ...] = ()
    """Class names or label numbers."""
    groups: tuple[str, ...] = ()
    """Names of groups."""
    sources: tuple[str, ...] = ()
    """Patterns of the source's name, as of a shell."""
    min_seconds: float = 0.0
    """Seconds of the shortest clip."""
    min_side: int = 0
    """Pixels of the shortest short side."""
    min_rate: float = 0.0
    """Frames per second of the slowest clip."""

    def __post_init__(self) -> None:
        for name in ("min_seconds", "min_side", "min_rate"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")

    @classmethod
    def parse(cls, entries: Iterable[str]) -> "ClipFilter":
        """The filter of entries as ``labels=cat`` or ``min_seconds=2``. Raises ValueError for one without sense."""
        found: dict[str, Any] = {}
        for entry in entries:
            name, _, text = entry.partition("=")
            default = getattr(cls, name) if name in {each.name for each in fields(cls)} else None
            if default is None or not text:
                raise ValueError(f"{entry!r} is no FIELD=VALUE of {', '.join(each.name for each in fields(cls))}")
            if isinstance(default, tuple):
                found[name] = (*found.get(name, ()), text)
                continue
            try:
                found[name] = type(default)(text)
            except ValueError:
                raise ValueError(f"{entry!r} has no number") from None
        return cls(**found)


@dataclass(frozen=True)
class DataConfig:
    """The store and the threads that read it."""

    store: str = "data/demo/store"
    """Folder written by ``vito-fast pack``, or its address, as ``s3://bucket/store`` (ours)."""
    mix: tuple[str, ...] = ()
    """Further stores, each as ``PATH=WEIGHT``, for a run on several; ``store`` has weight 1, and evaluations during the
    run are on it (ours)."""
    where: tuple[str, ...] = ()
    """Filters of the clips of every store, as ``labels=cat labels=dog sources=sports/* min_seconds=2 min_side=224
    min_rate=24``; a clip passes all fields, and one entry of each; empty = all clips (ours)."""
    threads: int = 0
    """Decoding threads of each process; 0 = the usable cores, divided among the ranks of this machine (ours)."""
    prefetch: int = 2
    """Batches prepared ahead of the step (ours)."""
    max_bad_share: float = 0.05
    """Share of samples that may fail to decode, and be replaced, before the run stops (ours)."""
    holdout: str = ""
    """Store of held-out clips, their videos in one folder a class, for an evaluation by nearest neighbors; empty = none
    (ours)."""
    cache: str = ""
    """Folder on this machine for the blocks of remote stores; empty = ``$VITO_FAST_CACHE``, else ``vito-fast`` in the
    user's cache folder (ours)."""
    cache_gib: float = 0.0
    """GiB that the cache may take on the disk; 0 = ``$VITO_FAST_CACHE_GIB``, else 50 (ours)."""

    def __post_init__(self) -> None:
        _require(0 <= self.threads <= 1024, "data.threads", self.threads, "0 to 1024")
        _require(self.prefetch >= 0, "data.prefetch", self.prefetch, "0 or more")
        _require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "in [0, 1]")
        _require(0 <= self.cache_gib < math.inf, "data.cache_gib", self.cache_gib, "0 or more")
        weights = self.weights.values()
        valid = len(weights) == len(self.mix) + 1 and all(0 < weight < math.inf for weight in weights)
        _require(valid, "data.mix", self.mix, "stores as PATH=WEIGHT, each once, with weights above 0")
        try:
            ClipFilter.parse(self.where)
        except ValueError as error:
            raise ValueError(f"data.where: {error}") from None
        least = min(weights) / sum(weights)
        _require(least >= 2e-4, "data.mix", self.mix, "weights that give each store at least 0.0002 of the samples")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each store by its path, NaN where it is no number."""
        found = {self.store: 1.0}
        for path, _, weight in (entry.rpartition("=") for entry in self.mix):
            try:
                found[path] = float(weight) if path else math.nan
            except ValueError:
                found[path] = math.nan
        return found


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn. A value out of range raises ``ValueError`` with the field and the value."""

    size: int = 224
    """Side of a view in pixels, after the crop is resized (ancestor)."""
    views: int = 3
    """Views of a clip, 1 to 4 (paper: 3 in the main runs, 2 in the study of data sets)."""
    frame_window: float = 2.56
    """Seconds that hold all views of a clip, each frame uniform in them (paper); 0 = all views are one frame."""
    fixed_frames: bool = False
    """Draw each clip's frames once for the whole run (rebuttal: the ablation with one fixed pair a video)."""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """Area of a crop as a share of the frame, uniform (paper; its lower bound on images is 0.08)."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of a crop, log-uniform (paper)."""
    crop_fit: Literal["clip", "retry"] = "clip"
    """For a crop larger than the frame. clip: cut its sides (ancestor: mean area 0.61 on 16:9). retry: draw up to ten
    times, then take the center (torchvision: 0.52)."""
    flip: float = 0.5
    """Probability of a horizontal flip (ancestor)."""
    jitter: float = 0.8
    """Probability of color jitter: four changes in random order (ancestor)."""
    brightness: float = 0.4
    """Largest shift of brightness (ancestor)."""
    contrast: float = 0.4
    """Largest deviation of the contrast factor from 1 (ancestor)."""
    saturation: float = 0.2
    """Largest deviation of the saturation factor from 1 (ancestor)."""
    hue: float = 0.1
    """Largest shift of hue in turns (ancestor)."""
    grayscale: float = 0.2
    """Probability of conversion to grayscale (ancestor)."""
    blur: tuple[float, ...] = (1.0, 0.1, 1.0)
    """Probability of blur in each view; the last repeats (ancestor, and for a third view the paper)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, uniform (ancestor)."""
    solarize: tuple[float, ...] = (0.0, 0.2, 0.0)
    """Probability of solarizing at 0.5 in each view; the last repeats (ancestor, and for a third view the paper)."""
    small_crops: int = 0
    """Small crops of each view, queries of the other views' keys (multi-crop; ours: as in SwAV and DINO, off)."""
    small_size: int = 96
    """Side of a small crop in pixels (ours)."""
    small_area: tuple[float, float] = (0.1, 0.4)
    """Area of a small crop as a share of its view, uniform (ours)."""

    def __post_init__(self) -> None:
        for name, smallest in (("size", 1), ("views", 1), ("small_crops", 0), ("small_size", 1)):
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and value >= smallest, f"an integer of at least {smallest}")
        self._check("views", self.views <= MAX_VIEWS, f"at most {MAX_VIEWS}")
        self._check("crop_fit", self.crop_fit in ("clip", "retry"), "clip or retry")
        for name in ("frame_window", "brightness"):
            self._check(name, _within(getattr(self, name), 0, math.inf), "finite and at least 0")
        for name in ("flip", "jitter", "grayscale", "contrast", "saturation"):
            self._check(name, _within(getattr(self, name), 0, 1), "within 0 and 1")
        self._check("hue", _within(self.hue, 0, 0.5), "within 0 and 0.5 turns")
        for name, least, most, rule in (
            ("crop_area", 0, 1, "a range within (0, 1]"),
            ("small_area", 0, 1, "a range within (0, 1]"),
            ("crop_aspect", 1e-3, 1e3, "a range within 0.001 and 1000"),
            ("blur_sigma", 0, math.inf, "a range above 0"),
        ):
            low, *rest = values = getattr(self, name)
            good = len(rest) == 1 and all(_within(value, least, most) for value in values) and 0 < low <= rest[0]
            self._check(name, good, rule)
        for name in ("blur", "solarize"):
            values = getattr(self, name)
            good = 1 <= len(values) <= MAX_VIEWS and all(_within(value, 0, 1) for value in values)
            self._check(name, good, f"1 to {MAX_VIEWS} probabilities within 0 and 1")

    def _check(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise ValueError(f"sampler.{name} is {getattr(self, name)!r}, must be {rule}")


def _within(value: float, low: float, high: float) -> bool:
    return isinstance(value, int | float) and low <= value <= high and math.isfinite(value)


@dataclass(frozen=True)
class ModelConfig:
    """The encoder, its pooling and its heads."""

    backbone: str = "resnet50"
    """resnet18, resnet34, resnet50 (paper: ResNet-50); ``timm:NAME`` (paper: Swin-S) or ``torchvision:NAME`` where that
    library is installed."""
    init: str = ""
    """Weights that a new run starts from: a run, a checkpoint, a ``.safetensors`` or ``.pth`` file, ``timm:NAME`` or
    ``torchvision:NAME`` (pretrained); empty = random (ours)."""
    levels: int = 2
    """How many last stages are pooled: 2 = strides 16 and 32 (paper); 1 = the last alone (ablation)."""
    pooling: Literal["attention", "average"] = "attention"
    """Spatial pooling of each level: learned attention (paper) or the mean (ablation)."""
    attention_hidden: int = 0
    """Hidden width of the attention MLP; 0 = the stage's channels (ours: the paper states two layers and no width)."""
    heads: Literal["concatenated", "per_level"] = "concatenated"
    """concatenated: one projector on the pooled vectors of all levels, hence one loss (paper). per_level: a projector
    and a loss for each level, summed (ours)."""
    projector_hidden: int = 4096
    """Hidden width of projector and predictor (ancestor)."""
    projector_out: int = 256
    """Width of the embedding that is contrasted (ancestor)."""
    predictor: bool = False
    """Whether the online network has a predictor after its projector (paper: no; ancestor: DetCon-B and BYOL do)."""
    batch_norm: Literal["per_view", "joint"] = "per_view"
    """Statistics of each view alone, as in a forward pass of each (ancestor), or of all views of a step (ours)."""
    zero_init_residual: bool = True
    """Start each residual block as the identity: the last norm's weight is 0 (ours, usual for large batches)."""
    checkpoint_activations: bool = False
    """Recompute each residual block in the backward pass instead of keeping its activations (ours)."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the online network's last block, linear from 0 in the first (ours). The target has
    none."""

    def __post_init__(self) -> None:
        _require(self.levels in (1, 2, 3, 4), "model.levels", self.levels, "1 to 4")
        for name in ("projector_hidden", "projector_out"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        _require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "in [0, 1)")
        _require(self.attention_hidden >= 0, "model.attention_hidden", self.attention_hidden, "0 or more")

    @property
    def embeddings(self) -> int:
        """How many embeddings an image has, each with a projector and a loss of its own."""
        return self.levels if self.heads == "per_level" else 1


@dataclass(frozen=True)
class LossConfig:
    """The objective: the sum of one term for each ordered pair of views and each embedding (paper).

    A sum grows with the pairs: 2 for two views, 6 for three. LARS cancels the factor where the trust ratio applies, but
    for weight decay. Biases and norms, which it excludes, take updates that many times larger than of the mean.
    """

    name: Literal["contrastive", "byol"] = "contrastive"
    """InfoNCE against other videos (paper), or BYOL's cosine regression without negatives (ancestor)."""
    temperature: float = 0.1
    """Softmax temperature (paper)."""
    negatives: Literal["cross_view", "both_views"] = "cross_view"
    """Keys of the other view only (paper), or of both views: 2B-1 logits (DetCon-B, ancestor)."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "loss.temperature", self.temperature, "above 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """LARS (paper), or AdamW, usual for transformers. Bias and norm parameters are excluded from weight decay and from
    the trust ratio (ancestor)."""

    name: Literal["lars", "adamw"] = "lars"
    """LARS (paper), or AdamW, which has no trust ratio (ours: the paper states none for its Swin-S)."""

    base_lr: float = 0.3
    """Learning rate for a batch of 256 clips, scaled by batch/256 (paper)."""
    weight_decay: float = 1e-6
    """Added to the gradient before the trust ratio (paper)."""
    momentum: float = 0.9
    """Heavy-ball momentum, applied after the trust ratio and before the learning rate (ancestor)."""
    trust_coefficient: float = 1e-3
    """Ratio of the update's norm to the parameter's, before the learning rate (ancestor: eta of LARS)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two averages (ours: as in MAE and MoCo v3's successors)."""
    layer_decay: float = 1.0
    """Factor on the learning rate of each layer of the backbone before the last, for a start from trained weights;
    AdamW only (ours)."""
    clip_norm: float = 0.0
    """Euclidean norm to which larger gradients are scaled down, over all parameters; 0 = never (ours)."""

    def __post_init__(self) -> None:
        _require(self.base_lr > 0, "optimizer.base_lr", self.base_lr, "above 0")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        _require(self.trust_coefficient > 0, "optimizer.trust_coefficient", self.trust_coefficient, "above 0")
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        decays = 0 < self.layer_decay <= 1 and (self.layer_decay == 1 or self.name == "adamw")
        _require(decays, "optimizer.layer_decay", self.layer_decay, "in (0, 1], and 1 with lars")
        _require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 or more")


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run, learning rate and moving average."""

    epochs: float = 300.0
    """Epochs of ``epoch_clips`` examples (paper; 200 in its comparison of video methods)."""
    epoch_clips: int = 1_280_000
    """Examples of an epoch on any store, as many as ImageNet has (paper); 0 = each clip of the store once (ours)."""
    warmup_epochs: float = 10.0
    """Linear warm-up of the learning rate (ancestor: BYOL), then cosine to 0 (paper)."""
    base_ema: float = 0.99
    """tau_0 of the target's moving average, tau_k = 1 - (1 - tau_0)(cos(pi k / K) + 1)/2 (ancestor: BYOL at 300 epochs.
    The paper states no rate)."""

    def __post_init__(self) -> None:
        _require(0 < self.epochs <= 1e9, "schedule.epochs", self.epochs, "above 0, and at most 1e9")
        _require(0 <= self.epoch_clips <= 10**15, "schedule.epoch_clips", self.epoch_clips, "0 to 1e15")
        _require(0 <= self.warmup_epochs <= 1e9, "schedule.warmup_epochs", self.warmup_epochs, "0 to 1e9")
        _require(0 <= self.base_ema <= 1, "schedule.base_ema", self.base_ema, "in [0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """The machine's side of the loop. Only ``batch_size`` and ``micro_batches`` change the result beyond rounding."""

    batch_size: int = 4096
    """Clips in one step over all ranks together (paper)."""
    micro_batches: int = 1
    """Micro-batches of a rank's share; cached gradients keep the loss over the whole batch. Batch norm takes its
    statistics over one micro-batch (ours)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = a GPU if there is one (ours)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 = autocast with float32 weights and loss; float64 is for numerical checks (ours)."""
    channels_last: bool = True
    """Memory format of activations and convolution weights (ours)."""
    compile: bool = False
    """``torch.compile`` of both networks and of the target's average (ours)."""
    cuda_graphs: bool = False
    """Replay both compiled networks as CUDA graphs (torch.compile's reduce-overhead), for small batches on one GPU
    (ours). Untested on a GPU."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl; the only steps that wait for the device (ours)."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written at the end (ours)."""
    keep_last: int = 2
    """Newest checkpoints kept (ours)."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 = none (ours)."""
    evaluate_every: int = 0
    """Steps between retrieval evaluations; 0 = at the start and the end only (ours)."""
    evaluate_clips: int = 264
    """Maximum clips of the retrieval evaluation; fewer are drawn up to four times each (ours)."""
    collapse_std: float = 0.05
    """A logged step warns of collapse if an ``embedding_std`` is below this; 0 = never (ours). A spread over the whole
    sphere has 1, one point has 0."""
    collapse_rank: float = 2.0
    """Likewise for ``embedding_rank``, the dimensions of the embeddings; 0 = never (ours). A line has 1. It needs eight
    times as many clips on each rank."""
    max_bad_steps: int = 20
    """Consecutive steps with a non-finite loss or gradient, all skipped, before the run stops (ours)."""
    timeout: float = 30.0
    """Minutes that a rank waits for the others before the run ends: longer than an evaluation takes (ours)."""
    wandb: str = ""
    """Project of Weights & Biases for the rows, under the run's name; empty = none (ours)."""
    mlflow: str = ""
    """Experiment of MLflow for the rows, under the run's name; empty = none (ours)."""
    runs: str = "runs"
    """Directory that holds the runs, each in a folder of its name (ours)."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "micro_batches",
            "log_every",
            "checkpoint_every",
            "keep_last",
            "max_bad_steps",
            "evaluate_clips",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for wanted, holds in (("train.compile", self.compile), ("a GPU", self.device != "cpu")):
            _require(holds or not self.cuda_graphs, "train.cuda_graphs", True, f"false without {wanted}")
        known = not any("\ud800" <= letter <= "\udfff" for letter in self.runs)
        _require(known, "train.runs", self.runs, "UTF-8, for TensorBoard")
        _require(0 <= self.collapse_std < 1, "train.collapse_std", self.collapse_std, "in [0, 1)")
        _require(0 < self.timeout <= 1e5, "train.timeout", self.timeout, "above 0, and at most 1e5")
        for name in ("keep_every", "evaluate_every", "collapse_rank"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")

    def clips(self, ranks: int) -> int:
        """Clips of one of ``ranks`` processes in a step. UserError if the batch does not divide among them."""
        if self.batch_size % (ranks * self.micro_batches):
            raise UserError(
                f"train.batch_size {self.batch_size} does not divide among {ranks} processes x {self.micro_batches} "
                f"micro-batches: take a multiple of {ranks * self.micro_batches}"
            )
        return self.batch_size // ranks


@dataclass(frozen=True)
class Config:
    """A whole run. ``vito-fast train FILE.yaml --section.field VALUE`` overrides any field."""

    name: str = "run"
    """Folder of the run inside ``train.runs``."""
    seed: int = 0
    """Determines the initial weights and every sample; the same seed gives the same run on one machine."""
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        named = "/" not in self.name and self.name not in ("", ".", "..") and self.name.isprintable()
        _require(named, "name", self.name, "a folder's name")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        views = self.sampler.views
        _require(views >= 2, "sampler.views", views, "2 to 4: the loss compares views of a clip")
        alone = self.loss.name == "contrastive" and self.train.batch_size == 1
        _require(not alone, "train.batch_size", 1, "at least 2 with the contrastive loss: negatives are other clips")

    def steps_per_epoch(self, clips: int) -> float:
        """Steps of an epoch on a store of ``clips`` clips; only an epoch of ``epoch_clips`` can have a fraction."""
        size = self.train.batch_size
        return self.schedule.epoch_clips / size if self.schedule.epoch_clips else clips // size


def _require(holds: bool, key: str, value: object, wanted: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        holds, wanted = False, "a finite number"
    if not holds:
        raise ValueError(f"{key} must be {wanted}, got {value!r}")
