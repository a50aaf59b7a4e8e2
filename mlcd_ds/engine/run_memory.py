"""How much memory a backbone's training takes on a rank: what ZeRO keeps and shards, and activations."""

from __future__ import annotations

import torch

from mlcd_ds.distributed.ds_config import ZeroBuffers
from mlcd_ds.engine.activations import Activations
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.precision import is_autocast
from mlcd_ds.models.layers import Recompute
from mlcd_ds.models.tower import num_parameters
from mlcd_ds.models.vit import ViT, ViTConfig

DECODED_PIXELS = 1_000_000  # of an image as it is stored: assumed
BATCHES_IN_FLIGHT = 2  # one that is decoded beside the one that is trained on


def decoding_memory(batch: int, image_size: int, decoded_pixels: int = DECODED_PIXELS) -> int:
    """Bytes that DALI takes on a GPU to decode batches of so many images, where torch's allocator does not see them.

    Of an image: decoded and cropped in bytes, twice at the final size in bytes (resized, colours changed), and in fp32.
    """
    pixels = image_size**2
    return BATCHES_IN_FLIGHT * batch * 3 * (2 * decoded_pixels + 2 * pixels + 4 * pixels)


def training_memory(
    config: ViTConfig,
    precision: str,
    layout: Layout,
    micro_batch: int,
    *,
    recompute: Recompute = "none",
    token_drop: float = 0.0,
    is_accumulated: bool = False,
    has_average: bool = False,
    buffers: ZeroBuffers = ZeroBuffers(),  # noqa: B008  frozen
) -> dict[str, int]:
    """Bytes on a rank at the peak of a step with AdamW, by use: their sum is the peak.

    `is_accumulated`: a step has several micro-batches. `has_average`: a moving average of the weights is kept. ZeRO's
    sharding is arXiv 1910.02054's, figure 1; the rest is what DeepSpeed 0.19 was seen to keep (benchmarks/memory.py):
    an fp32 copy of the weights from stage 1 on, even of fp32 weights; whole gradients between the micro-batches at
    stage 1; copies of the gradients in the optimizer's step.
    """
    with torch.device("meta"):
        count = num_parameters(ViT(config)) // layout.tensor_parallel
    stage = layout.zero_stage
    owned = count // layout.data_parallel if stage else count  # the weights that this rank updates
    has_autocast = is_autocast(precision, stage)
    is_short = precision != "fp32" and not has_autocast
    width = 2 if is_short else 4

    weights = (owned if stage == 3 else count) * width
    if has_autocast:
        weights += count * 2  # autocast's bf16 copy
    if stage == 3 and layout.data_parallel > 1:
        weights += (min(count, buffers.live) + min(count, buffers.prefetched)) * width
    has_fp32_copy = stage > 0 or is_short
    states = owned * (12 if has_fp32_copy else 8)
    always = {"weights": weights, "optimizer states": states}
    if has_average:
        always["average of the weights"] = owned * 4

    buckets = buffers.gradients * width if stage else 0
    if stage == 0 and layout.num_ranks > 1:
        buckets = min(buffers.gradients, count) * width
    gradients = owned * width
    before = 0  # gradients of earlier micro-batches
    if stage == 3:
        before = gradients
    elif is_accumulated:
        before = count * width if stage == 1 else gradients
    activations = Activations(config, precision, recompute, token_drop, layout.tensor_parallel, has_autocast)
    images = 3 * config.image_size**2 * 4
    copies = (owned * width if stage else 0) + (owned * 4 if is_short else 0)
    # fp32 copies for a reduction, also for the last one, which comes before the gradients' copies.
    reduced = min(buffers.fp32_copies, count * (2 if stage == 3 else 1)) * 4 if is_short else 0
    moments = (
        {
            "gradients": before,
            "buckets of gradients": buckets + reduced if stage else 0,
            "activations": micro_batch * (activations.kept_bytes + activations.backward_bytes + images),
        },
        {"gradients": gradients, "buckets of gradients": buckets + reduced},
        {"gradients": gradients, "buckets of gradients": buckets if stage == 3 else 0, "copies of gradients": copies},
    )
    return always | max(moments, key=lambda parts: sum(parts.values()))
