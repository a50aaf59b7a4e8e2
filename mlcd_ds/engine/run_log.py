"""A run's log: scalars as JSON lines and in TensorBoard, and pages that show the data once.

TensorBoard pages
  loss        the loss and its two terms
  optimizer   learning rate; gradient norms; steps skipped since the last entry, where the gradient of backbone or head
              was not finite (in fp16 a high loss scale does that); the loss scale, where it is dynamic; with two towers
              the factor on cosines (logit_scale)
  embeddings  their mean length before they are normalised, of a micro-batch of rank 0; with two towers the gap between
              the modalities: the distance between the means of all images and all texts of a batch
  speed       images/s, TFLOP/s of a rank in the backbone's matmuls, MFU on known GPUs, share of time waiting for data;
              over all the time between entries, except for these accuracies
  time        seconds of a step of rank 0, and of its parts: see engine/step_clock.py
  evaluation  accuracies on data.knn_index, by kNN and zero-shot (engine/monitors.py)
  memory      the largest so far; progress: epochs
  text: the resolved configuration; images: samples of some clusters; histogram: cluster sizes.

The JSON lines have the same values, null for one that is not finite; accuracies have lines of their own.
"""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import numpy as np
import torch

from mlcd_ds.artefacts.files import write_atomic
from mlcd_ds.artefacts.readers import parse_json, read_bytes
from mlcd_ds.data.dali import EvaluationDecoder, WholeImages
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.pixels import center_square
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError

METRICS_NAME = "metrics.jsonl"
CLUSTERS_SHOWN, MEMBERS_SHOWN, SHOWN_SIZE = 8, 8, 96


class RunLog:
    """Scalars of a run; on a resumed run, entries after `first_step` are dropped first. Rank 0 has one."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_NAME
        kept = entries_until(self._path, first_step) if self._path.exists() else []
        write_atomic(self._path, lambda file: file.write(b"".join(line + b"\n" for line in kept)))
        self._file = open(self._path, "ab", buffering=0)  # nothing is left for close() to fail on
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One entry: `page/name` -> value after `step` steps."""
        try:
            entry = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **entry}).encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror or error}). Free the disk, start again."
            ) from None
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self.writer.close()


def entries_until(path: Path, step: int) -> list[bytes]:
    """Lines of a metrics.jsonl up to a step. A last line cut by a kill is dropped; any other bad line is an error."""
    *lines, _ = read_bytes(path, "Let it be read, or move it away.").split(b"\n")
    kept = []
    for number, line in enumerate(lines, 1):
        where, fix = f"{path} line {number}", "Remove this line."
        entry = parse_json(line, where, fix)
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise UserError(f"{where} names no step. {fix}")
        if entry["step"] <= step:
            kept.append(line)
    return kept


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: of the GPU's allocator, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def log_data_pages(log: RunLog, data: TrainingData, recipe_yaml: str) -> None:
    """The configuration as text; where there are labels, cluster sizes as a histogram, and a grid with a row of members
    for some clusters."""
    log.writer.add_text("config", f"```yaml\n{recipe_yaml}```")
    if "labels" in data.fields:
        log.writer.add_histogram("clusters/images_per_center", data.labels.sizes(), 0)
        log.writer.add_image("clusters/samples", cluster_grid(data.index, data.labels), 0)
    log.writer.flush()


def cluster_grid(index: ShardIndex, labels: LabelStore) -> np.ndarray:
    """uint8 [3, H, W]: a line of images for each of some clusters, taken from the first shards."""
    shards = np.flatnonzero(index.counts)[:8].tolist()
    found = [(shard, row) for shard in shards for row in range(int(index.counts[shard]))]
    nearest = np.concatenate([labels.shard(shard)[:, 0] for shard in shards])
    centers, counts = np.unique(nearest, return_counts=True)
    by_size = centers[np.argsort(-counts, kind="stable")]
    shown = by_size[np.linspace(0, max(0, (counts >= MEMBERS_SHOWN).sum() - 1), CLUSTERS_SHOWN).astype(int)]
    grid = np.full((3, CLUSTERS_SHOWN * SHOWN_SIZE, MEMBERS_SHOWN * SHOWN_SIZE), 255, dtype=np.uint8)
    reader = ShardReader(index)
    pixels = center_square(SHOWN_SIZE, (0.0,) * 3, (1.0,) * 3)
    decoder = EvaluationDecoder(1, pixels, torch.device("cpu"), num_threads=1)
    for line, center in enumerate(shown):
        for column, place in enumerate(np.flatnonzero(nearest == center)[:MEMBERS_SHOWN]):
            shard, row = found[place]
            samples = index.samples(shard)
            content = reader.read(shard, samples.image, row)
            decoder.push(WholeImages([content], samples.sizes_N2[row : row + 1]))
            image = decoder.pop()[0].clamp(0, 255).to(torch.uint8).numpy()
            y, x = line * SHOWN_SIZE, column * SHOWN_SIZE
            grid[:, y : y + SHOWN_SIZE, x : x + SHOWN_SIZE] = image
    reader.close()
    return grid
