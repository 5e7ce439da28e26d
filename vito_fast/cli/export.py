"""``vito-fast export``, ``features`` and ``attention``: use the encoder of a run."""

from typing import Annotated, Any, Literal

import tyro

from vito_fast.cli.overrides import Address, Place


def export(
    run: Place,
    out: Place,
    format: Literal["torchvision", "timm"] | None = None,
    ext: Literal["safetensors", "pth"] | None = None,
    network: Literal["online", "target"] = "online",
    push_to_hub: str = "",
) -> int:
    """Write a run's encoder so that a plain torchvision or timm network loads it.

    Args:
        run: A run's folder, or one checkpoint file.
        out: The file to write; without .safetensors or .pth at its end, --ext is added.
        format: Whose names and conventions the file follows; by default those of the network's own library.
        ext: safetensors (the default) or pth.
        network: The network that learned, or its moving average.
        push_to_hub: USER/NAME on the Hugging Face Hub, to upload it to; made private if it is absent.
    """
    from vito_fast.export import export as write
    from vito_fast.export import push_to_hub as upload

    made = write(run, out, format, ext, network)
    print(f"load it with: {made.load}")
    print(f"images: {made.images}")
    print(f"features: {made.features}")
    if made.untrained:
        print(f"untrained: {', '.join(made.untrained)}; m(x) has them, these features do not")
    if push_to_hub:
        print(f"uploaded: {upload(made, push_to_hub)}")
    print(f"exported: {made.path}")
    return 0


def features(
    encoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")],
    inputs: Place,
    out: Place,
    size: int | None = None,
    frames: int = 4,
    pooling: Literal["mean", "attention"] = "mean",
    per_frame: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Write an encoder's features of images or videos.

    Args:
        encoder: A run, a checkpoint, a .safetensors or .pth file, timm:NAME, timm:NAME@FILE, random or pixels.
        inputs: A folder of images or videos, searched recursively, or one file.
        out: The file, .safetensors or .parquet.
        size: Side of the center crop in pixels; by default that of the training. The short side is 8 / 7 of it.
        frames: Frames of a video, evenly spaced.
        pooling: mean over the last level, or attention: the vectors of a run's pools.
        per_frame: One row a frame of a video, instead of their mean.
        device: auto takes a GPU where there is one.
    """
    from vito_fast.evaluate.write_features import write_features
    from vito_fast.train.distributed import init_distributed

    place = init_distributed(device).device
    options: dict[str, Any] = {"size": size, "frames": frames, "pooling": pooling, "per_frame": per_frame}
    rows, columns = write_features(encoder, inputs, out, **options, device=place)
    print(f"features: {out}, {rows} rows of {columns}")
    return 0


def attention(run: Place, video: Address, out: Place, frames: int = 6, size: int = 224) -> int:
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
