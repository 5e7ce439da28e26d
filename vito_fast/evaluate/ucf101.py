"""UCF101: a clip's class from the mean of its frames' features and one linear layer, fine-tuned end to end or frozen.

The folder holds ``UCF-101/CLASS/v_CLASS_gNN_cNN.avi`` and ``ucfTrainTestlist/`` with ``classInd.txt``,
``trainlist01.txt`` and ``testlist01.txt``, as the benchmark's two archives unpack.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vito_fast.errors import UserError
from vito_fast.evaluate.augment import color_jitter, random_resized_crop, resize_center_crop
from vito_fast.evaluate.data import manifest, missing
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.finetune import Recipe, finetune
from vito_fast.evaluate.result import mean_metric
from vito_fast.evaluate.task import Check, Measured, Progress, Task, gathered, own_share

COUNTS = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
"""Videos of the training and the test list of each split."""
CLASSES = 101


@dataclass(frozen=True)
class Ucf101Options(Recipe):
    """The recipe, and how clips are read."""

    split: int = 1
    frames: int = 32
    """Frames of a clip."""
    fps: float = 16.0
    """Rate at which they are taken."""
    size: int = 224
    """Side of the network's input in pixels."""
    min_area: float = 0.08
    """Smallest crop of a training clip, as a share of the picture."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)
    """Brightness, contrast, saturation and hue of a training clip."""
    dropout: float = 0.5
    """Before the linear layer."""
    test_clips: int = 10
    """Clips of a test video, evenly spaced; their class probabilities are averaged."""
    seed: int = 0
    subset: bool = False
    """Whether lists of other lengths than the benchmark's are scored; the result says so."""


class Video(NamedTuple):
    """A line of a list."""

    path: Path
    name: str
    label: int


class Ucf101(Task):
    """Top-1 of one split."""

    name, title, options = "ucf101", "UCF101, action classification", Ucf101Options

    def check(self, data: Path, options: Ucf101Options) -> Check:
        """Counts both lists, looks for every video, and refuses groups that are in both lists."""
        if options.split not in COUNTS:
            return Check((f"split must be 1, 2 or 3, got {options.split}",))
        try:
            classes, train, test = read_lists(data, options.split)
        except UserError as error:
            return Check((str(error),))
        problems = missing(data, [str(v.path.relative_to(data)) for v in train + test], "unpack UCF101.rar there")
        shared = {group_of(v) for v in train} & {group_of(v) for v in test}
        if shared:
            problems.append(f"the lists share {len(shared)} groups, as {min(shared)}: use the official lists")
        expected, found = (*COUNTS[options.split], CLASSES), (len(train), len(test), len(classes))
        notes: list[str] = []
        if found != expected:
            text = "{:,} training videos, {:,} test videos, {} classes"
            line = f"{text.format(*found)}; split {options.split} has {text.format(*expected)}"
            (notes if options.subset else problems).append(line)
        files = [] if problems else [v.path for v in train + test]
        lists = sorted((data / "ucfTrainTestlist").glob("*.txt"))
        steps = options.steps(len(train)) * options.batch_size
        images = (3 * steps + options.test_clips * len(test)) * options.frames
        size = (options.size, options.size)
        return Check(tuple(problems), len(test), manifest(data, files, lists), images, size, True, notes=tuple(notes))

    def measure(self, encoder: Encoder, data: Path, options: Ucf101Options, work: Path) -> Measured:
        """Fine-tunes on the training list, then scores the test list."""
        classes, train, test = read_lists(data, options.split)
        torch.manual_seed(options.seed)
        model: Any = ClipClassifier(encoder, len(classes), options.dropout)
        clips = TrainClips(train, options, encoder.channels[-1])
        finetune(model, clips, options, work, encoder.device, seed=options.seed, label="ucf101 training")
        own, progress = own_share(test), Progress("ucf101 test", len(own_share(test)))
        scores = {}
        for video in own:
            clip = read_clips(video.path, options.test_clips, options)
            order = model.predict(clip.to(encoder.device)).argsort(descending=True).tolist()
            scores[video.name] = {"top1": float(order[0] == video.label), "top5": float(video.label in order[:5])}
            progress.step()
        items = gathered(scores, (video.name for video in test))
        groups = {
            name: {"top1": mean_metric((items[v.name]["top1"] for v in test if v.label == number), "share").value}
            for number, name in enumerate(classes)
        }
        metrics = {name: mean_metric((s[name] for s in items.values()), "share") for name in ("top1", "top5")}
        return Measured(metrics, items, groups, {"seed": options.seed})


def read_lists(data: Path, split: int) -> tuple[list[str], list[Video], list[Video]]:
    """Classes, training and test videos of a split. UserError for lists that are missing or make no sense."""
    folder = data / "ucfTrainTestlist"
    if not (data / "UCF-101").is_dir() or not folder.is_dir():
        raise UserError(f"{data} holds no UCF-101/ and ucfTrainTestlist/: unpack both archives of the benchmark there")
    classes = [line.split()[1] for line in _lines(folder / "classInd.txt")]
    known = {name: number for number, name in enumerate(classes)}
    lists = []
    for kind in ("train", "test"):
        path, videos = folder / f"{kind}list{split:02d}.txt", []
        for line in _lines(path):
            name = line.split()[0]
            label = known.get(name.split("/")[0])
            if label is None or name.count("/") != 1 or ".." in name:
                raise UserError(f"{path}: '{name}' is no CLASS/VIDEO of classInd.txt")
            videos.append(Video(data / "UCF-101" / name, name, label))
        lists.append(videos)
    return classes, lists[0], lists[1]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path}: {error}") from None


def group_of(video: Video) -> str:
    """The source that a video was cut from, v_CLASS_gNN: its cuts look alike and belong on one side."""
    return Path(video.name).stem.rpartition("_c")[0]


class TrainClips:
    """Training clips: a random moment, a random crop, flip and colors; the same for all frames of a clip."""

    def __init__(self, videos: list[Video], options: Ucf101Options, width: int) -> None:
        self.videos, self.options, self.width = videos, options, width

    def __len__(self) -> int:
        return len(self.videos)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``images`` (T,3,S,S) uint8, ``label``, and ``uniform`` (C,) in [0, 1), which dropout decides by."""
        video, options = self.videos[index], self.options
        images = read_clip(video.path, rng.random(), options.frames, options.fps)
        images = random_resized_crop(images, rng, options.size, options.min_area)
        images = color_jitter(images, rng, options.jitter)
        images = images.flip(-1) if rng.random() < 0.5 else images
        return {"images": images, "label": video.label, "uniform": torch.from_numpy(rng.random(self.width, np.float32))}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of clips (B,T,3,S,S)."""
        return {
            "images": torch.stack([s["images"] for s in samples]),
            "labels": torch.tensor([s["label"] for s in samples]),
            "uniform": torch.stack([s["uniform"] for s in samples]),
        }


class ClipClassifier(nn.Module):
    """Mean of the last stage over space and a clip's frames, dropout, one linear layer."""

    def __init__(self, encoder: Encoder, classes: int, dropout: float) -> None:
        super().__init__()
        self.backbone = encoder.trainable()
        self.head = nn.Linear(encoder.channels[-1], classes)
        self.dropout, self.mean, self.std = dropout, encoder.mean, encoder.std

    def features(self, clips: Tensor) -> Tensor:
        """uint8 (B,T,3,S,S) -> (B,C)."""
        frozen = not self.backbone.training
        mean, std = (torch.tensor(v, device=clips.device).view(3, 1, 1) for v in (self.mean, self.std))
        images = (clips.flatten(0, 1).float() / 255 - mean) / std
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.backbone(images)[-1].mean((2, 3)).unflatten(0, clips.shape[:2]).mean(1).float()

    def loss(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross-entropy of a training batch."""
        kept = (batch["uniform"] >= self.dropout) / (1 - self.dropout)
        logits = self.head(self.features(batch["images"]) * kept)
        each = F.cross_entropy(logits, batch["labels"], reduction="none")
        return {"cross_entropy": (each.sum(), each.new_tensor(len(each)))}

    @torch.no_grad()
    def predict(self, clips: Tensor) -> Tensor:
        """A video's clips (K,T,3,S,S) uint8 -> class probabilities (classes,)."""
        return torch.stack([self.head(self.features(clip[None])).softmax(1)[0] for clip in clips]).mean(0)


def read_clip(path: Path, place: float, frames: int, fps: float) -> Tensor:
    """A clip (T,3,H,W) uint8 that begins at ``place`` (0 to 1) of the starts that fit; a short video loops.

    Raises:
        UserError: for a video that cannot be decoded.
    """
    pictures, times = decode(path)
    return _taken(pictures, times, place, frames, fps)


def read_clips(path: Path, count: int, options: Ucf101Options) -> Tensor:
    """``count`` evenly spaced clips (K,T,3,S,S) uint8 of a video, resized and center-cropped."""
    pictures, times = decode(path)
    places = np.linspace(0, 1, count) if count > 1 else [0.5]
    clips = [_taken(pictures, times, float(place), options.frames, options.fps) for place in places]
    return torch.stack([resize_center_crop(clip, options.size) for clip in clips])


def _taken(pictures: Tensor, times: np.ndarray, place: float, frames: int, fps: float) -> Tensor:
    duration = times[-1] + (times[-1] / max(1, len(times) - 1))
    start = place * max(0.0, duration - frames / fps)
    wanted = (start + np.arange(frames) / fps) % max(duration, 1e-9)
    at = np.searchsorted(times, wanted + 1e-6, side="right") - 1
    return pictures[torch.from_numpy(at.clip(0, len(times) - 1))]


def decode(path: Path) -> tuple[Tensor, np.ndarray]:
    """All frames (N,3,H,W) uint8 of a short video, and their times in seconds from the first."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 25)
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"cannot decode {path}: {' '.join(str(error).split())}") from None
    if not pictures:
        raise UserError(f"cannot decode {path}: it has no frames")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), np.arange(len(pictures)) / rate
