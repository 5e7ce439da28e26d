"""The geometry of a batch by DALI: decode, cut out the crop window, resize, mirror.

One definition serves CPU and GPU; only the operators' device differs. The specification is
:mod:`vito_fast.data.geometry`; colour is not DALI's but ``vito_kernels.photometric``'s, on the uint8 views made here.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vito_fast.errors import UserError

Source = Literal["jpeg", "frames", "video"]


class DecodeError(Exception):
    """DALI refused a batch; the message is the reason. The pipeline has been made anew and can go on."""


def _dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise UserError(f"reading a store needs NVIDIA DALI ({error}): pip install 'vito-fast[train]'") from None
    return Pipeline, fn, types


class Geometry:
    """Pictures and crop windows in, square uint8 views out. Use by one thread at a time.

    Args:
        source: what is given: ``jpeg`` (files, of which only the window is decoded), ``frames`` ((H, W, 3) uint8,
            already cut to the window) or ``video`` (small video files of which ``pictures`` are wanted).
        size: side S of a view in pixels.
        views: V, views a sample.
        max_batch: the most samples a call.
        device: ``cpu`` or ``cuda[:n]``: JPEG is then decoded by nvJPEG, video by NVDEC.
        threads: DALI's own.

    The resize is cubic without an antialiasing filter, as the ancestors' (BYOL, DetCon: ``tf.image.resize``).
    Deterministic; a view does not depend on the rest of its batch.
    """

    def __init__(
        self, source: Source, size: int, views: int, max_batch: int, *, device: torch.device, threads: int = 1
    ):
        self.source, self.size, self.views, self.max_batch = source, size, views, max_batch
        self.device, self.threads = device, threads
        self._streams = views if source == "video" else 1  # a video's views are cut from one decoded sequence
        self._pipeline = self._build()

    def _build(self) -> Any:
        pipeline_class, fn, types = _dali()
        gpu = self.device.type == "cuda"
        index = self.device.index if self.device.index is not None else (torch.cuda.current_device() if gpu else None)
        pipeline = pipeline_class(
            batch_size=self.max_batch * self.views // self._streams, num_threads=self.threads, device_id=index,
            exec_pipelined=False, exec_async=False, prefetch_queue_depth=1,
        )  # fmt: skip

        def given(name: str, dtype: Any, ndim: int = 1, **options: Any) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim, **options)

        with pipeline:
            data = given("data", types.UINT8, 3 if self.source == "frames" else 1, no_copy=True)
            if self.source == "video":
                data = fn.decoders.video(
                    data, device="mixed" if gpu else "cpu", frames=given("pictures", types.INT32), pad_mode="none"
                )
            views = []
            for view in range(self._streams):
                if self.source == "frames":
                    window = data.gpu() if gpu else data
                else:
                    bounds = {
                        "start": given(f"start{view}", types.INT32),
                        "shape": given(f"shape{view}", types.INT32),
                    }
                    if self.source == "jpeg":
                        window = fn.decoders.image_slice(
                            data, device="mixed" if gpu else "cpu", axis_names="HW", adjust_orientation=False, **bounds
                        )
                    else:
                        window = fn.slice(data[view], axes=(0, 1), **bounds)
                views.append(
                    fn.resize(
                        window,
                        size=(self.size, self.size),
                        interp_type=types.INTERP_CUBIC,
                        antialias=False,
                        roi_start=given(f"from{view}", types.FLOAT),
                        roi_end=given(f"to{view}", types.FLOAT),
                        roi_relative=True,
                    )
                )
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
        """V tensors (N, S, S, 3) uint8 on the device, valid until the next call; the device's work is done.

        Args:
            data: N videos, or N * V JPEGs or cut frames, a sample's views side by side.
            crop: (N, V, 4) y, x, height, width in pixels of the picture (not looked at for ``frames``).
            mirror: (N, V, 2) whether to mirror top to bottom, and left to right.
            pictures: N times (V,), the wanted pictures of each video in presentation order.

        Raises DecodeError if DALI refuses any of it.
        """
        feed = self._pipeline.feed_input
        rows = len(data)
        try:
            feed("data", list(data), layout="HWC" if self.source == "frames" else None)
            if self.source == "video":
                feed("pictures", [np.ascontiguousarray(p, np.int32) for p in pictures])
            for view in range(self._streams):
                part = slice(view, view + 1) if self._streams > 1 else slice(None)
                if self.source != "frames":
                    bounds = np.ascontiguousarray(crop[:, part]).reshape(rows, 4)
                    feed(f"start{view}", np.ascontiguousarray(bounds[:, :2]))
                    feed(f"shape{view}", np.ascontiguousarray(bounds[:, 2:]))
                backwards = np.ascontiguousarray(mirror[:, part]).reshape(rows, 2).astype(np.float32)
                feed(f"from{view}", backwards)  # a region of interest that runs from 1 to 0 mirrors
                feed(f"to{view}", 1 - backwards)
            outputs = [torch.from_dlpack(output.as_tensor()) for output in self._pipeline.run()]
        except RuntimeError as error:
            self._pipeline = self._build()  # DALI's are of no use after an error
            raise DecodeError(reason(error)) from None
        return outputs if self._streams > 1 else list(outputs[0].unflatten(0, (-1, self.views)).unbind(1))


def reason(error: RuntimeError) -> str:
    """The telling line of DALI's report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = ("Critical error", "Error in ", "which was used", "Current pipeline", "File ", "Stacktrace", "(")
    telling = [line for line in lines if not line.startswith(noise)]
    return (telling or lines or ["unknown error"])[0]
