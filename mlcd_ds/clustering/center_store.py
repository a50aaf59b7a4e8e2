"""The centres of `mlcd cluster` on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlcd_ds.artefacts.manifest import Manifest, check_file, read_manifest
from mlcd_ds.clustering.assigner import Metric


class ClusterManifest(Manifest):
    """Manifest of `mlcd cluster`, with an entry an iteration, over the `num_rows` that it read.

    `objective` is the mean similarity to the nearest centre, or the mean squared distance from it (`metric`).
    """

    num_images: int
    num_centers: int
    dim: int
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
        path = check_file(folder, "centers.npy", self.manifest.files["centers.npy"], "cluster")
        self.centers_CE: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
