"""``vito-fast export`` and ``vito-fast attention``: use the encoder of a run."""

from typing import Literal

from vito_fast.cli.overrides import Place


def export(
    run: Place,
    out: Place,
    format: Literal["torchvision", "timm"] = "torchvision",
    ext: Literal["safetensors", "pth"] | None = None,
    network: Literal["online", "target"] = "online",
) -> int:
    """Write a run's encoder so that a plain torchvision or timm network loads it.

    Args:
        run: A run's folder, or one checkpoint file.
        out: The file to write; without .safetensors or .pth at its end, --ext is added.
        format: Whose names and conventions the file follows.
        ext: safetensors (the default) or pth.
        network: The network that learned, or its moving average.
    """
    from vito_fast.export import export as write

    path, hint = write(run, out, format, ext, network)
    print(f"load it with: {hint}")
    print(f"exported: {path}")
    return 0


def attention(run: Place, video: Place, out: Place, frames: int = 6, size: int = 224) -> int:
    """Draw where the encoder looks in a video: frames above, the attention of each scale below.

    Args:
        run: A run's folder, or one checkpoint file.
        video: Any video file; or a store, for one frame of each of several clips.
        out: The PNG to write.
        frames: How many, evenly spaced over the video or store.
        size: Short side of each frame in pixels.
    """
    from vito_fast.train.attention_maps import draw

    draw(run, video, out, frames, size)
    print(f"drawn: {out}")
    return 0
