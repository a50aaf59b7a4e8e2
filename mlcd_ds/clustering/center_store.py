"""The centres of `mlcd cluster` on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from mlcd_ds.artefacts.manifest import Manifest, output_array, read_manifest
from mlcd_ds.clustering.assigner import Metric


class ClusterManifest(Manifest):
    """Manifest of `mlcd cluster`. Tuples have one entry per iteration, over the `num_rows` rows that it read.

    `objective` is the mean similarity to the nearest centre, or the mean squared distance from it (`metric`).
    """

    num_images: int = Field(ge=0)
    num_centers: int = Field(ge=1)
    dim: int = Field(ge=1)
    metric: Metric = "cosine"
    objective: tuple[float, ...]
    num_splits: tuple[int, ...]
    num_rows: tuple[int, ...] = ()
    num_duplicates: int = 0


class CenterStore:
    """Centres fp32 [C, E], of unit length for the cosine; memory-mapped. Opening compares the file's checksum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, ClusterManifest, "cluster")
        shape = (self.manifest.num_centers, self.manifest.dim)
        self.centers_CE = output_array(folder, self.manifest, "centers.npy", np.float32, shape, mmap="r")
