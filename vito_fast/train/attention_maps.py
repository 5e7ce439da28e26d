"""Where the encoder looks: attention maps of a video's frames as a picture grid. People would rather look."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from vito_fast.errors import UserError
from vito_fast.export import config_of
from vito_fast.model.pair import Branch
from vito_fast.train.checkpoint import Checkpoint, find
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

Pixels = npt.NDArray[np.uint8]


def load_online(checkpoint: Checkpoint) -> Branch:
    """The online branch of a checkpoint, on the CPU, in evaluation mode."""
    model = config_of(checkpoint).model
    branch = Branch(model, predictor=model.predictor)
    branch.load_state_dict(checkpoint.part("model.online."))
    return branch.eval()


def video_frames(path: Path, count: int, size: int) -> Pixels:
    """``count`` frames (n,H,W,3) evenly spaced over a video, upright, short side about ``size``, both sides multiples
    of 32; of a store, the middle frames of clips evenly spaced over it.

    Fewer if the video has fewer. UserError if it cannot be read; OSError or ValueError for a damaged clip of a store.
    """
    import av

    from vito_fast.data.store.media import for_ffmpeg, rgb

    if (path / "store.json").is_file():
        return _resized(_store_frames(path, count), size)
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


def _store_frames(store: Path, count: int) -> list[Pixels]:
    """The middle frame of ``count`` clips, evenly spaced over the store."""
    from vito_fast.data.store.store import Store, frames

    opened = Store(store)
    clips = sorted({round(i) for i in np.linspace(0, len(opened) - 1, min(count, len(opened)))})
    return [frames(opened, clip, [len(opened.index.times(clip)) // 2])[0] for clip in clips]


def _resized(pictures: list[Pixels], size: int) -> Pixels:
    """All to the first one's shape at short side ``size``, rounded to 32. UserError if that is more than FFmpeg scales
    to."""
    from av import FFmpegError, VideoFrame

    sides = pictures[0].shape[:2]
    height, width = (max(32, round(side * size / min(sides) / 32) * 32) for side in sides)
    to = {"format": "rgb24", "width": width, "height": height, "interpolation": "AREA"}
    try:
        return np.stack([VideoFrame.from_ndarray(picture, format="rgb24").to_ndarray(**to) for picture in pictures])
    except FFmpegError:
        raise UserError(
            f"--size {size} makes frames of {width}x{height}, too large to draw: take a smaller one"
        ) from None


@torch.no_grad()
def attention_maps(branch: Branch, frames: Pixels) -> list[Tensor]:
    """Pooling weights as maps (n,h,w) of each scale, finest first, each summing to 1, of uint8 frames (n,H,W,3):
    float32 on the CPU, wherever the branch is and in whichever mode."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    maps = []
    for features, pool in zip(branch.backbone(images.to(next(branch.parameters()))), branch.pools, strict=True):
        maps.append(pool(features)[1].unflatten(1, features.shape[2:]).float().cpu())
    return maps


def overlay(frames: Pixels, maps: Tensor) -> Pixels:
    """Frames (n,H,W,3) in grey, coloured by maps (n,h,w): red where a location weighs most in its frame, blue least.

    A frame whose map is not finite (of a run that has failed) stays grey: nothing is known of it.
    """
    known = torch.isfinite(maps).flatten(1).all(1)
    maps = torch.where(known[:, None, None], maps, 0.0)
    maps = F.interpolate(maps[:, None], frames.shape[1:3], mode="bicubic", align_corners=False)[:, 0].clamp(min=0)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    t = ((maps - low) / (high - low).clamp(min=1e-12)).numpy()[..., None]
    hot = np.concatenate([1.5 - np.abs(4 * t - 3), 1.5 - np.abs(4 * t - 2), 1.5 - np.abs(4 * t - 1)], -1).clip(0, 1)
    grey = frames.mean(-1, keepdims=True) / 255
    hot = np.where(known.numpy()[:, None, None, None], hot, grey)
    mixed: Pixels = ((0.55 * grey + 0.45 * hot) * 255).round().astype(np.uint8)
    return mixed


def draw(run: Path, video: Path, out: Path, count: int = 6, size: int = 224) -> None:
    """The grid of a run's newest checkpoint for ``count`` frames of a video or store (see ``write_grid``).

    UserError if the run has no attention pooling, or run, video or output cannot be used.
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
    """Writes a PNG, one column for each frame of uint8 (n,H,W,3): the frame itself, then its attention at each scale,
    finest first. The branch must pool by attention; its mode is left alone. UserError if ``out`` cannot be written.
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
