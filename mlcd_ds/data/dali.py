"""DALI: the one graph that decodes images, on CPU and on GPU, for every stage. The only file that imports DALI.

The graph has no state and no random numbers: encoded images, crop boxes and flips come in, pixels go out. What is read
and how it is cropped is decided outside (order.py, crops.py), so runs resume bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.data.pixels import PixelFormat
from mlcd_ds.errors import UserError

COLORS = ("brightness", "contrast", "saturation", "hue")  # in the order of EncodedBatch.colors_B4


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded images [B] (JPEG, PNG, WebP bytes), crop boxes [B, 4] (top, left, height, width), flips [B].

    `origin` says where the images are from, for messages. `colors_B4`: factors on brightness, contrast and saturation,
    and a turn of the hue in degrees; only for a decoder that changes colours.
    """

    images: list[bytes]
    boxes_B4: np.ndarray
    flips_B: np.ndarray
    origin: str = "images"
    colors_B4: np.ndarray | None = None


def _import_dali():
    try:
        import nvidia.dali
    except ImportError:
        raise UserError('DALI is not installed: pip install "mlcd_ds[cpu]" (or [gpu]).') from None
    return nvidia.dali


class ImageDecoder:
    """Decode, crop, resize (bicubic with antialiasing), perhaps change colours, flip and normalise batches.

    Asynchronous: `push` queues a batch, `pop` returns the images of the oldest, so that decoding overlaps compute.
    Errors of a broken image surface in `pop` as UserError; the decoder is unusable afterwards.
    """

    def __init__(
        self,
        batch_size: int,
        pixels: PixelFormat,
        device: torch.device,
        num_threads: int,
        *,
        changes_colors: bool = False,
    ) -> None:
        _import_dali()
        from nvidia.dali import fn, pipeline_def, types

        is_gpu = device.type == "cuda"
        place = "gpu" if is_gpu else "cpu"

        @pipeline_def
        def graph():
            encoded = fn.external_source(name="encoded", no_copy=False)
            start = fn.external_source(name="start", ndim=1, dtype=types.INT32)
            shape = fn.external_source(name="shape", ndim=1, dtype=types.INT32)
            flip = fn.external_source(name="flip", ndim=0, dtype=types.INT32)
            images = fn.decoders.image(encoded, device="mixed" if is_gpu else "cpu", output_type=types.RGB)
            images = fn.slice(images, start=start, shape=shape, axes=[0, 1], device=place)
            images = fn.resize(
                images,
                resize_x=pixels.image_size,
                resize_y=pixels.image_size,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                device=place,
            )
            if changes_colors:
                colors = {name: fn.external_source(name=name, ndim=0, dtype=types.FLOAT) for name in COLORS}
                images = fn.color_twist(images, device=place, **colors)
            return fn.crop_mirror_normalize(
                images,
                mirror=flip,
                mean=list(pixels.mean),
                std=list(pixels.std),
                dtype=types.FLOAT,
                output_layout="CHW",
                device=place,
            )

        self._pipeline = graph(
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device.index or 0 if is_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        self._pipeline.build()
        self.batch_size, self._pixels, self._device = batch_size, pixels, device
        self._changes_colors = changes_colors
        self._queued: deque[EncodedBatch] = deque()

    def push(self, batch: EncodedBatch) -> None:
        """Queue a batch (at most the decoder's batch size) and start decoding it."""
        feed = self._pipeline.feed_input
        feed("encoded", [np.frombuffer(image, dtype=np.uint8) for image in batch.images])
        feed("start", np.ascontiguousarray(batch.boxes_B4[:, :2]))
        feed("shape", np.ascontiguousarray(batch.boxes_B4[:, 2:]))
        feed("flip", np.ascontiguousarray(batch.flips_B))
        if self._changes_colors:
            assert batch.colors_B4 is not None
            for name, values_B in zip(COLORS, batch.colors_B4.T, strict=True):
                feed(name, np.ascontiguousarray(values_B))
        self._pipeline.schedule_run()
        self._queued.append(batch)

    def pop(self) -> Tensor:
        """Images [B, 3, S, S] fp32 of the oldest queued batch, on the device."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        side, batch = self._pixels.image_size, self._queued.popleft()
        images_B3SS = torch.empty((len(batch.images), 3, side, side), device=self._device)
        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise UserError(
                f"DALI could not decode one of these, though `mlcd index` could: {batch.origin}: {first_line(error)}. "
                "If a shard was changed, run `mlcd index --overwrite`; else remove the image from its shard first."
            ) from None
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), images_B3SS, cuda_stream=stream)
        self._pipeline.release_outputs()
        return images_B3SS


def first_line(error: Exception) -> str:
    """The line of a DALI error that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Error", "encoded", "Failed", "[", "Assert"))]
    return (told or lines or ["no message"])[-1][:200]


def decoded_sizes(images: Sequence[bytes], num_threads: int) -> list[tuple[int, int] | None]:
    """Height and width of each image as DALI decodes it (on the CPU, EXIF orientation applied), None where it fails.

    A batch with a broken image fails as a whole; its images are then tried in halves.
    """
    _import_dali()
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def graph():
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
