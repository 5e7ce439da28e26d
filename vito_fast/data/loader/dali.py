"""Decode, crop, resize and mirror a batch by DALI.

One definition serves CPU and GPU. Only the operators' device and the resize differ. On a CPU, csrc/resize.cpp takes a
fifth of the time of DALI's: 0.3 against 1.7 ms for a frame of 256 x 456. The specification is :mod:`.resize_reference`.
Color is augmented later, on the uint8 views, by ``vito_kernels.photometric``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vito_fast.data.store.description import Route
from vito_fast.errors import UserError
from vito_fast.native import sampler as _sampler


class DecodeError(Exception):
    """DALI rejected a batch. The message is DALI's reason. The pipeline is rebuilt and can be used again."""


def _dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise UserError(f"reading this store needs NVIDIA DALI ({error}): pip install 'vito-fast[train]'") from None
    return Pipeline, fn, types


class DecodeCropResize:
    """Encoded frames and crop windows in, square uint8 views out. Use from one thread at a time.

    The resize is bicubic without an antialiasing filter, as in BYOL and DetCon (``tf.image.resize``). Deterministic. A
    view does not depend on the rest of its batch.

    Args:
        route: Kind of input. ``image``: JPEG files, of which only the window is decoded. ``frames``: (H, W, 3) uint8,
            already cropped. ``video``: small video files.
        size: Side S of a view in pixels.
        views: V, views per sample.
        max_batch: Largest number of samples per call.
        device: ``cpu`` or ``cuda[:n]``. A GPU decodes JPEG by nvJPEG and video by NVDEC.
        threads: DALI's own threads.
        native: Whether csrc resizes, not DALI. None: on a CPU.
    """

    def __init__(
        self,
        route: Route,
        size: int,
        views: int,
        max_batch: int,
        *,
        device: torch.device,
        threads: int = 1,
        native: bool | None = None,
    ):
        self.route, self.size, self.views, self.max_batch = route, size, views, max_batch
        self.device, self.threads = device, threads
        self.native = device.type == "cpu" if native is None else native
        self._streams = views if route == "video" else 1  # a video's views are cut from one decoded sequence
        self._fed: list[npt.NDArray[np.uint8]] = []
        self._pipeline: Any = None if self.native and route == "frames" else self._build()

    def _build(self) -> Any:
        pipeline_class, fn, types = _dali()
        gpu = self.device.type == "cuda"
        index = self.device.index if self.device.index is not None else (torch.cuda.current_device() if gpu else None)
        decoder = "mixed" if gpu else "cpu"
        pipeline = pipeline_class(
            batch_size=self.max_batch * self.views // self._streams, num_threads=self.threads, device_id=index,
            exec_pipelined=False, exec_async=False, prefetch_queue_depth=1,
        )  # fmt: skip

        def source(name: str, dtype: Any, ndim: int = 1, **options: Any) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim, **options)

        with pipeline:
            data = source("data", types.UINT8, 3 if self.route == "frames" else 1, no_copy=True)
            if self.route == "video":  # by default a missing frame comes out black, without an error
                data = fn.decoders.video(
                    data, device=decoder, frames=source("pictures", types.INT32), pad_mode="none"
                )  # fmt: skip
            views = []
            for view in range(self._streams):
                if self.route == "frames":
                    window = data.gpu() if gpu else data
                else:
                    at = {"start": source(f"start{view}", types.INT32), "shape": source(f"shape{view}", types.INT32)}
                    if self.route == "image":
                        window = fn.decoders.image_slice(
                            data, device=decoder, axis_names="HW", adjust_orientation=False, **at
                        )
                    else:
                        window = fn.slice(data[view], axes=(0, 1), **at)
                if not self.native:
                    window = fn.resize(
                        window, size=(self.size, self.size), interp_type=types.INTERP_CUBIC, antialias=False,
                        roi_start=source(f"from{view}", types.FLOAT), roi_end=source(f"to{view}", types.FLOAT),
                        roi_relative=True,
                    )  # fmt: skip
                views.append(window)
            pipeline.set_outputs(*views)
        pipeline.build()
        return pipeline

    def __call__(
        self,
        data: Sequence[npt.NDArray[np.uint8]],
        crop: npt.NDArray[np.int32],
        mirror: npt.NDArray[np.bool_],
        pictures: Sequence[npt.NDArray[np.int32]] = (),
    ) -> list[Tensor]:
        """Make the views of one batch.

        Args:
            data: N videos, or N * V JPEGs or cropped frames, a sample's views side by side.
            crop: (N, V, 4) y, x, height, width in pixels of the frame. Ignored for ``frames``.
            mirror: (N, V, 2) whether to mirror vertically and horizontally.
            pictures: N arrays (V,), the numbers of the wanted frames of each video in presentation order.

        Returns:
            V tensors (N, S, S, 3) uint8 on the device, valid until the next call. The device has finished them.

        Raises:
            DecodeError: DALI rejects any of the data.
        """
        if self._pipeline is None:
            (mirrored,) = self._split(mirror)
            return self._by_view([self._resized(data, mirrored)])
        try:
            self._feed(data, crop, mirror, pictures)
            outputs = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = self._build()  # DALI's pipeline cannot be used after an error
            raise DecodeError(_reason(error)) from None
        if not self.native:
            return self._by_view([torch.from_dlpack(output.as_tensor()) for output in outputs])
        windows = [[np.asarray(output.at(row)) for row in range(len(data))] for output in outputs]
        return self._by_view([self._resized(*each) for each in zip(windows, self._split(mirror), strict=True)])

    def _feed(
        self,
        data: Sequence[npt.NDArray[np.uint8]],
        crop: npt.NDArray[np.int32],
        mirror: npt.NDArray[np.bool_],
        pictures: Sequence[npt.NDArray[np.int32]],
    ) -> None:
        feed = self._pipeline.feed_input
        self._fed = [np.ascontiguousarray(each) for each in data]  # DALI reads from here while it runs
        feed("data", self._fed, layout="HWC" if self.route == "frames" else None)
        if self.route == "video":
            feed("pictures", [np.ascontiguousarray(each, np.int32) for each in pictures])
        for view, (bounds, mirrored) in enumerate(zip(self._split(crop), self._split(mirror), strict=True)):
            if self.route != "frames":
                feed(f"start{view}", np.ascontiguousarray(bounds[:, :2]))
                feed(f"shape{view}", np.ascontiguousarray(bounds[:, 2:]))
            if not self.native:
                backwards = mirrored.astype(np.float32)
                feed(f"from{view}", backwards)  # a region from 1 to 0 mirrors
                feed(f"to{view}", 1 - backwards)

    def _split(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Split (N, V, K) into (rows, K) for each stream of the pipeline."""
        if self._streams == 1:
            return [values.reshape(-1, values.shape[2])]
        return [values[:, view] for view in range(self.views)]

    def _by_view(self, streams: list[Tensor]) -> list[Tensor]:
        return streams if self._streams > 1 else list(streams[0].unflatten(0, (-1, self.views)).unbind(1))

    def _resized(self, windows: Sequence[npt.NDArray[np.uint8]], mirror: npt.NDArray[np.bool_]) -> Tensor:
        squares = np.empty((len(windows), self.size, self.size, 3), np.uint8)
        for window, (vertically, horizontally), square in zip(windows, mirror.tolist(), squares, strict=True):
            _sampler.resize_cubic(window, (0, 0, *window.shape[:2]), vertically, horizontally, square)
        return torch.from_numpy(squares)


def mirrors(
    flip: npt.NDArray[np.uint8], rotation: npt.NDArray[np.int64], mirror: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Mirrorings before the rotation that amount to a horizontal flip after it. A quarter turn swaps the two axes.

    Args:
        flip: (N, V) whether a view is flipped.
        rotation: (N,) degrees clockwise of each sample's clip.
        mirror: (N,) whether the clip is mirrored left to right before the rotation.

    Returns:
        (N, V, 2) whether to mirror vertically and horizontally.
    """
    sideways = (rotation % 180 != 0)[:, None]
    flipped = flip.astype(bool)
    return np.stack([flipped & sideways, (flipped & ~sideways) ^ mirror[:, None]], -1)


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = ("Critical error", "Error in ", "which was used", "Current pipeline", "File ", "Stacktrace", "(")
    causes = [line for line in lines if not line.startswith(noise)]
    return (causes or lines or ["unknown error"])[0]
