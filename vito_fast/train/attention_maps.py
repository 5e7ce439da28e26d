"""Attention maps of a video's frames as a grid of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from vito_fast.errors import UserError
from vito_fast.model.pair import Branch
from vito_fast.train.checkpoint import Checkpoint, config_of, find
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from vito_fast.data.store.store import Store

Pixels = npt.NDArray[np.uint8]


def load_online(checkpoint: Checkpoint) -> Branch:
    """The online branch of a checkpoint, on the CPU, in evaluation mode."""
    model = config_of(checkpoint).model
    branch = Branch(model, predictor=model.predictor)
    branch.load_state_dict(checkpoint.part("model.online."))
    return branch.eval()


def video_frames(source: "str | Path | Store", count: int, size: int) -> Pixels:
    """Reads frames evenly spaced over a video, or the middle frames of clips evenly spaced over a store.

    Args:
        source: A video file, or a store, opened or by its folder or address.
        count: Frames; fewer if there are fewer.
        size: Short side in pixels, about; both sides become multiples of 32.

    Returns:
        Upright frames (n,H,W,3) uint8.

    Raises:
        UserError: the video cannot be read.
        OSError, ValueError: a damaged clip of a store.
    """
    import av

    from vito_fast.data.store.media import for_ffmpeg
    from vito_fast.data.store.picture import rgb
    from vito_fast.data.store.remote import is_remote
    from vito_fast.data.store.store import Store

    if isinstance(source, Store) or is_remote(source) or (Path(source) / "store.json").is_file():
        return _resized(_store_frames(source, count), size)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no video or store {path}")
    try:
        with av.open(for_ffmpeg(path)) as container:
            total = sum(1 for _ in container.decode(video=0))
        if total == 0:
            raise UserError(f"{path} has no frames")
        wanted = {round(i) for i in np.linspace(0, total - 1, min(count, total))}
        with av.open(for_ffmpeg(path)) as container:
            pictures = [rgb(f) for i, f in enumerate(container.decode(video=0)) if i in wanted]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path} is not a video that can be read: {' '.join(str(error).split())}") from None
    return _resized(pictures, size)


def _store_frames(store: "str | Path | Store", count: int) -> list[Pixels]:
    """The middle frame of ``count`` clips, evenly spaced over the store."""
    from vito_fast.data.store.store import Store, frames

    opened = store if isinstance(store, Store) else Store(store)
    clips = sorted({round(i) for i in np.linspace(0, len(opened) - 1, min(count, len(opened)))})
    return [frames(opened, clip, [len(opened.index.times(clip)) // 2])[0] for clip in clips]


def _resized(pictures: list[Pixels], size: int) -> Pixels:
    """Resizes all to the first one's shape at short side ``size``, rounded to 32. UserError above FFmpeg's limit."""
    from av import FFmpegError

    sides = pictures[0].shape[:2]
    height, width = (max(32, round(side * size / min(sides) / 32) * 32) for side in sides)
    try:
        return resized(pictures, (height, width))
    except FFmpegError:
        raise UserError(
            f"--size {size} makes frames of {width}x{height}, too large to draw: take a smaller one"
        ) from None


def resized(pictures: list[Pixels], sides: Sequence[int]) -> Pixels:
    """Frames (H,W,3), each resized to ``sides`` = (height, width): (n,height,width,3)."""
    from av import VideoFrame

    to = {"format": "rgb24", "height": sides[0], "width": sides[1], "interpolation": "AREA"}
    return np.stack(
        [VideoFrame.from_ndarray(np.ascontiguousarray(p), format="rgb24").to_ndarray(**to) for p in pictures]
    )


@torch.no_grad()
def attention_maps(branch: Branch, frames: Pixels) -> list[Tensor]:
    """Pooling weights of uint8 frames (n,H,W,3), in the branch's current mode.

    Returns:
        Maps (n,h,w) of each level, finest first, each summing to 1: float32 on the CPU.
    """
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    maps = []
    for features, pool in zip(branch.backbone(images.to(next(branch.parameters()))), branch.pools, strict=True):
        maps.append(pool(features)[1].unflatten(1, features.shape[2:]).float().cpu())
    return maps


def overlay(frames: Pixels, maps: Tensor) -> Pixels:
    """Gray frames (n,H,W,3) colored by maps (n,h,w): red at a frame's largest weight, blue at its smallest.

    A frame whose map is not finite stays gray.
    """
    known = torch.isfinite(maps).flatten(1).all(1)
    maps = torch.where(known[:, None, None], maps, 0.0)
    maps = F.interpolate(maps[:, None], frames.shape[1:3], mode="bicubic", align_corners=False)[:, 0].clamp(min=0)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    t = ((maps - low) / (high - low).clamp(min=1e-12)).numpy()[..., None]
    hot = np.concatenate([1.5 - np.abs(4 * t - 3), 1.5 - np.abs(4 * t - 2), 1.5 - np.abs(4 * t - 1)], -1).clip(0, 1)
    gray = frames.mean(-1, keepdims=True) / 255
    hot = np.where(known.numpy()[:, None, None, None], hot, gray)
    mixed: Pixels = ((0.55 * gray + 0.45 * hot) * 255).round().astype(np.uint8)
    return mixed


def draw(run: Path, video: str | Path, out: Path, count: int = 6, size: int = 224) -> None:
    """Writes the grid of a run's newest checkpoint (see ``write_grid``).

    Args:
        run: A run's folder, or one checkpoint file.
        video: A video file or a store.
        out: The PNG.
        count: Frames.
        size: Short side of a frame in pixels, 32 to 2048.

    Raises:
        UserError: the run has no attention pooling, or run, video or output cannot be used.
    """
    if count < 1 or not 32 <= size <= 2048:
        raise UserError(f"--frames must be at least 1 and --size 32 to 2048, got {count} and {size}")
    if out.suffix.lower() != ".png":
        raise UserError(f"the picture must be a .png, got {out}")
    checkpoint = find(run)
    branch = load_online(checkpoint)
    if config_of(checkpoint).model.pooling != "attention":
        raise UserError(f"{checkpoint.path} pools by average: it has no attention to draw")
    try:
        frames = video_frames(video, count, size)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    write_grid(branch, frames, out)


def write_grid(branch: Branch, frames: Pixels, out: Path) -> None:
    """Writes a PNG with one column a frame: the frame, then its attention at each level, finest first.

    Args:
        branch: Pools by attention; its mode does not change.
        frames: uint8 (n,H,W,3).
        out: The PNG.

    Raises:
        UserError: ``out`` cannot be written.
    """
    from PIL import Image, ImageDraw

    strides: list[int] = branch.backbone.strides  # type: ignore[assignment]
    rows = [("frame", frames)]
    for stride, maps in zip(strides, attention_maps(branch, frames), strict=True):
        rows.append((f"attention, stride {stride}", overlay(frames, maps)))
    gap, label = 4, 16
    n, height, width, _ = frames.shape
    canvas = Image.new("RGB", (n * (width + gap) + gap, len(rows) * (height + gap + label) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (title, pictures) in enumerate(rows):
        top = gap + r * (height + gap + label)
        pen.text((gap, top), title, fill="black")
        for c, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (gap + c * (width + gap), top + label))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
