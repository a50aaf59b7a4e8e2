"""DALI's graphs, which decode images on CPU and GPU: one to train, one to evaluate. The only file that imports DALI.

They have no state and no random numbers: encoded images, crop boxes and flips come in, pixels go out. What is read
and how it is cropped is decided outside (order.py; crops.py to train, frames.py to evaluate), so runs resume bit for
bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.data.frames import evaluation_frames
from mlcd_ds.data.pixels import PixelFormat
from mlcd_ds.errors import UserError

COLORS = ("brightness", "contrast", "saturation", "hue")  # in the order of EncodedBatch.colors_B4
REGION = (
    "begin_x",
    "end_x",
    "begin_y",
    "end_y",
    "begin",
    "end",
)  # corners (y, x): of columns, of rows, of both at once


@dataclass(frozen=True)
class EncodedBatch:
    """To train on: encoded images [B] (JPEG, PNG, WebP bytes), crop boxes [B, 4] (top, left, height, width), flips [B].

    `origin` says where the images are from, for messages. `colors_B4`: factors on brightness, contrast and saturation,
    and a turn of the hue in degrees; only for a decoder that changes colours.
    """

    images: list[bytes]
    boxes_B4: np.ndarray
    flips_B: np.ndarray
    origin: str = "images"
    colors_B4: np.ndarray | None = None


@dataclass(frozen=True)
class WholeImages:
    """To evaluate: encoded images [B], and their heights and widths int [B, 2] as the index has them."""

    images: list[bytes]
    sizes_B2: np.ndarray
    origin: str = "images"


def _import_dali() -> Any:
    """The package, without its types: they lack most names."""
    try:
        import nvidia.dali
    except ImportError:
        raise UserError('DALI is not installed: pip install "mlcd_ds[cpu]" (or [gpu]).') from None
    return nvidia.dali


class _Decoder:
    """Decode, make squares of side S, and normalise. Subclasses define how the squares are made.

    Asynchronous: `push` queues a batch, `pop` returns the images of the oldest, so that decoding overlaps compute.
    Errors of a broken image surface in `pop` as UserError; the decoder is unusable afterwards.
    """

    def __init__(self, batch_size: int, pixels: PixelFormat, device: torch.device, num_threads: int) -> None:
        dali = _import_dali()
        fn, types = dali.fn, dali.types
        is_gpu = device.type == "cuda"
        self.batch_size, self._pixels, self._device = batch_size, pixels, device
        self._place = "gpu" if is_gpu else "cpu"
        self._queued: deque[tuple[int, str]] = deque()

        @dali.pipeline_def(enable_conditionals=True)
        def graph() -> Any:
            encoded = fn.external_source(name="encoded", no_copy=False)
            # The GPU's decoder would otherwise repeat chroma, where libjpeg and so Pillow interpolate it.
            place = "mixed" if is_gpu else "cpu"
            images = fn.decoders.image(encoded, device=place, output_type=types.RGB, jpeg_fancy_upsampling=True)
            squares, flips = self._squares(images)
            return fn.crop_mirror_normalize(
                squares,
                mirror=flips,
                mean=list(pixels.mean),
                std=list(pixels.std),
                dtype=types.FLOAT,
                output_layout="CHW",
                device=self._place,
            )

        self._pipeline = graph(
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device.index or 0 if is_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        self._pipeline.build()

    def _squares(self, images: Any) -> tuple[Any, Any]:
        """Nodes of the graph: uint8 [S, S, 3] of each decoded image [H, W, 3], and whether it is mirrored."""
        raise NotImplementedError

    def _feed(self, images: list[bytes], origin: str, inputs: Mapping[str, np.ndarray]) -> None:
        """Hand over encoded images, and for each of them a row of each input."""
        self._pipeline.feed_input("encoded", [np.frombuffer(image, dtype=np.uint8) for image in images])
        for name, rows in inputs.items():
            self._pipeline.feed_input(name, np.ascontiguousarray(rows))
        self._pipeline.schedule_run()
        self._queued.append((len(images), origin))

    def pop(self) -> Tensor:
        """Images [B, 3, S, S] fp32 of the oldest queued batch, on the device."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        side, (num_images, origin) = self._pixels.image_size, self._queued.popleft()
        images_B3SS = torch.empty((num_images, 3, side, side), device=self._device)
        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise UserError(
                f"DALI could not decode one of these, though `mlcd index` could: {origin}: {first_line(error)}. "
                "If a shard was changed, run `mlcd index --overwrite`; else remove the image from its shard first."
            ) from None
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), images_B3SS, cuda_stream=stream)
        self._pipeline.release_outputs()
        return images_B3SS


class ImageDecoder(_Decoder):
    """For training: cut the box, resize it (bicubic with antialiasing), perhaps change colours, mirror."""

    def __init__(
        self,
        batch_size: int,
        pixels: PixelFormat,
        device: torch.device,
        num_threads: int,
        *,
        changes_colors: bool = False,
    ) -> None:
        self._changes_colors = changes_colors
        super().__init__(batch_size, pixels, device, num_threads)

    def _squares(self, images: Any) -> tuple[Any, Any]:
        fn, types = _import_dali().fn, _import_dali().types
        start = fn.external_source(name="start", ndim=1, dtype=types.INT32)
        shape = fn.external_source(name="shape", ndim=1, dtype=types.INT32)
        images = fn.slice(images, start=start, shape=shape, axes=[0, 1], device=self._place)
        images = fn.resize(
            images,
            resize_x=self._pixels.image_size,
            resize_y=self._pixels.image_size,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            device=self._place,
        )
        if self._changes_colors:
            colors = {name: fn.external_source(name=name, ndim=0, dtype=types.FLOAT) for name in COLORS}
            images = fn.color_twist(images, device=self._place, **colors)
        return images, fn.external_source(name="flip", ndim=0, dtype=types.INT32)

    def push(self, batch: EncodedBatch) -> None:
        """Queue a batch (at most the decoder's batch size) and start decoding it."""
        inputs = {"start": batch.boxes_B4[:, :2], "shape": batch.boxes_B4[:, 2:], "flip": batch.flips_B}
        if self._changes_colors:
            assert batch.colors_B4 is not None
            inputs |= dict(zip(COLORS, batch.colors_B4.T, strict=True))
        self._feed(batch.images, batch.origin, inputs)


class EvaluationDecoder(_Decoder):
    """For embedding and evaluation: whole images in a model's own `PixelFormat`, as transformers' processors make them.

    Pillow resamples columns, rounds to whole grey levels from 0 to 255, and then resamples rows. Here two
    passes, which take twice as long, are made only where the rounding between them shows in the result.
    """

    def _squares(self, images: Any) -> tuple[Any, Any]:
        fn, types = _import_dali().fn, _import_dali().types
        numbers = {
            name: fn.external_source(name=name, ndim=ndim, dtype=types.FLOAT)
            for name, ndim in {**dict.fromkeys(REGION, 1), "gains_x": 3, "gains_y": 3}.items()
        }
        gains = {axis: numbers[f"gains_{axis}"] for axis in "xy"}
        if self._place == "gpu":
            gains = {axis: gain.gpu() for axis, gain in gains.items()}
        images = fn.slice(
            images,
            start=fn.external_source(name="start", ndim=1, dtype=types.INT32),
            shape=fn.external_source(name="shape", ndim=1, dtype=types.INT32),
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=[0],
            device=self._place,
        )
        if fn.external_source(name="in_two_passes", ndim=0, dtype=types.BOOL):
            columns = self._resized(images, numbers["begin_x"], numbers["end_x"], "x") * gains["x"]
            columns = fn.cast(columns, dtype=types.UINT8)
            squares = self._resized(columns, numbers["begin_y"], numbers["end_y"], "y") * gains["y"]
        else:
            squares = self._resized(images, numbers["begin"], numbers["end"], "xy") * gains["x"] * gains["y"]
        return fn.cast(squares, dtype=types.UINT8), 0

    def _resized(self, images: Any, begin: Any, end: Any, axes: str) -> Any:
        """A region of images, resampled along these axes to the side of the square, not rounded."""
        fn, types = _import_dali().fn, _import_dali().types
        kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
        return fn.resize(
            images,
            **{f"resize_{axis}": self._pixels.image_size for axis in axes},
            mode="stretch",  # an axis that is not named stays as it is
            roi_start=begin,
            roi_end=end,
            roi_relative=True,
            interp_type=kinds[self._pixels.interpolation],
            antialias=True,
            dtype=types.FLOAT,
            device=self._place,
        )

    def push(self, batch: WholeImages) -> None:
        """Queue a batch (at most the decoder's batch size) and start decoding it."""
        frames = evaluation_frames(batch.sizes_B2, self._pixels)
        top, left, bottom, right = frames.regions_B4.T
        zero, one = np.zeros_like(top), np.ones_like(top)
        regions = ((zero, left), (one, right), (top, zero), (bottom, one), (top, left), (bottom, right))
        inputs = {
            "start": frames.windows_B4[:, :2],
            "shape": frames.windows_B4[:, 2:],
            "in_two_passes": frames.in_two_passes_B,
            "gains_x": frames.column_gains_BS[:, None, :, None],
            "gains_y": frames.row_gains_BS[:, :, None, None],
        }
        inputs |= {name: np.stack(corner, axis=1) for name, corner in zip(REGION, regions, strict=True)}
        self._feed(batch.images, batch.origin, inputs)


def first_line(error: Exception) -> str:
    """The line of a DALI error that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Error", "encoded", "Failed", "[", "Assert"))]
    return (told or lines or ["no message"])[-1][:200]


def decoded_sizes(images: Sequence[bytes], num_threads: int) -> list[tuple[int, int] | None]:
    """Height and width of each image as DALI decodes it (on the CPU, EXIF orientation applied), None where it fails.

    A batch with a broken image fails as a whole; its images are then tried in halves.
    """
    dali = _import_dali()
    fn, types = dali.fn, dali.types

    @dali.pipeline_def
    def graph() -> Any:
        return fn.decoders.image(fn.external_source(name="encoded"), device="cpu", output_type=types.RGB)

    def decode(part: Sequence[bytes]) -> list[tuple[int, int] | None]:
        if not part:
            return []
        pipeline = graph(batch_size=len(part), num_threads=num_threads, device_id=None, prefetch_queue_depth=1)
        pipeline.build()
        try:
            pipeline.feed_input("encoded", [np.frombuffer(image, dtype=np.uint8) for image in part])
            (output,) = pipeline.run()
        except RuntimeError:
            if len(part) == 1:
                return [None]
            middle = len(part) // 2
            return decode(part[:middle]) + decode(part[middle:])
        return [tuple(shape[:2]) for shape in output.shape()]

    return decode(images)
