"""The geometry of a batch by DALI: decode the crop window, resize, flip.

One definition serves CPU and GPU; only the decoder's device differs.
Colour is not DALI's: ``vito_kernels.photometric`` follows on the uint8 pictures made here.
"""

from collections.abc import Sequence

import numpy as np
import torch

from vito_fast.errors import UserError


class DecodeError(Exception):
    """DALI refused a batch."""


def _dali():
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UserError(f"reading a store needs NVIDIA DALI ({error}): pip install 'vito-fast[train]'") from None
    return fn, types, Pipeline


class Geometry:
    """Encoded pictures and crop windows in, square uint8 views out.

    source: ``jpeg`` (JPEG files, the window alone is decoded), ``frames`` ((H, W, 3) uint8 RGB pictures) or ``video``
    (small video files with the one frame number wanted). The resize is DALI's cubic without antialiasing, as the
    ancestors' (see :mod:`vito_fast.data.geometry` for the specification).
    """

    def __init__(
        self, source: str, size: int, max_batch: int, *, device: str = "cpu", threads: int = 2, depth: int = 1
    ):
        if source not in ("jpeg", "frames", "video"):
            raise ValueError(f"source is {source!r}, must be jpeg, frames or video")
        self.source, self.size, self.device, self.depth = source, size, torch.device(device), depth
        self._arguments = (max_batch, threads)
        self._pipeline = self._build()

    def _build(self):
        fn, types, pipeline_class = _dali()
        max_batch, threads = self._arguments
        gpu = self.device.type == "cuda"
        pipeline = pipeline_class(
            batch_size=max_batch, num_threads=threads, device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=self.depth, exec_dynamic=False,
        )  # fmt: skip
        with pipeline:
            pictures = fn.external_source(name="pictures", dtype=types.UINT8, ndim=3 if self.source == "frames" else 1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            window = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
            if self.source == "jpeg":
                decoder = "mixed" if gpu else "cpu"
                crop = fn.decoders.image_slice(pictures, start, shape, device=decoder, output_type=types.RGB, **window)
            elif self.source == "frames":
                crop = fn.slice(pictures.gpu() if gpu else pictures, start, shape, **window)
            else:
                wanted = fn.external_source(name="wanted", dtype=types.INT32, ndim=1)
                frames = fn.decoders.video(pictures, device="mixed" if gpu else "cpu", frames=wanted)
                crop = fn.slice(
                    fn.squeeze(frames, axes=0), start, shape, **{**window, "axis_names": None, "axes": (0, 1)}
                )
            square = fn.resize(crop, size=[self.size, self.size], interp_type=types.INTERP_CUBIC, antialias=False)
            pipeline.set_outputs(fn.flip(square, horizontal=flip))
        pipeline.build()
        return pipeline

    def feed(
        self, pictures: Sequence[np.ndarray], crop: np.ndarray, flip: np.ndarray, wanted: np.ndarray | None = None
    ) -> None:
        """Starts a batch: ``crop`` (N, 4) int32 y, x, h, w in pixels of each picture; ``flip`` (N,)."""
        self._pipeline.feed_input("pictures", list(pictures))
        self._pipeline.feed_input("start", np.ascontiguousarray(crop[:, :2]))
        self._pipeline.feed_input("shape", np.ascontiguousarray(crop[:, 2:]))
        self._pipeline.feed_input("flip", flip.astype(np.int32))
        if wanted is not None:
            self._pipeline.feed_input("wanted", wanted.astype(np.int32)[:, None])
        try:
            self._pipeline.schedule_run()
        except RuntimeError as error:
            raise DecodeError(_reason(error)) from None

    def take(self) -> torch.Tensor:
        """The oldest fed batch, (N, S, S, 3) uint8 on the device; valid until :meth:`release`. Raises DecodeError."""
        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise DecodeError(_reason(error)) from None
        return torch.from_dlpack(output.as_tensor())

    def release(self) -> None:
        self._pipeline.release_outputs()

    def run(self, pictures, crop, flip, wanted=None) -> torch.Tensor:
        """One batch, as a tensor of its own."""
        self.feed(pictures, crop, flip, wanted)
        result = self.take().clone()
        if result.is_cuda:
            torch.cuda.current_stream(result.device).synchronize()
        self.release()
        return result

    def rebuild(self) -> None:
        """A fresh pipeline: DALI's is of no use after an error. Batches fed and not taken are gone."""
        self._pipeline = self._build()


def _reason(error: RuntimeError) -> str:
    """The telling line of DALI's report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Stacktrace")]
    telling = [line for line in lines if "rror" in line and "operator" not in line and "occurred" not in line]
    return (telling or lines or ["unknown error"])[0]
