"""What is constant in an episode of ProtoCLIP: the clusters of its samples, and the prototypes made of them.

Teachers are the image tower, the text tower, and perhaps an external one; a student learns which cluster of a teacher
its partner is in. Clusters in which no sample is left after the last assignment are dropped: they have no mean to be
translated back, and as classes that nothing belongs to they would only draw targets.

N samples of the episode, sorted by id (n of this rank), K clusters, P projection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlcd_ds.artefacts.readers import read_tensors
from mlcd_ds.clustering.memory_rows import Share, cluster_rows
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError

NAME = "prototypes.safetensors"
FILE_NAME = re.compile(re.escape(NAME))
STUDENTS = {"image": "text", "text": "image"}
"""The towers, and the tower that is the teacher of each."""


@dataclass(frozen=True)
class Episode:
    """`labels` int32 [N] and `centers` [K, P] by teacher; `prototypes` [K, P] by "STUDENT/TEACHER", where there is back
    translation; and of the clusterings, by teacher, `objectives` and `empty`, the share of clusters that were dropped.
    """

    number: int
    ids_N: Tensor
    labels: Mapping[str, Tensor]
    centers: Mapping[str, Tensor]
    prototypes: Mapping[str, Tensor]
    objectives: Mapping[str, Tensor]
    empty: Mapping[str, Tensor]

    def labels_of(self, ids_B: Tensor, teacher: str) -> Tensor:
        """int64 [B]: the clusters of samples of the episode."""
        return self.labels[teacher][torch.searchsorted(self.ids_N, ids_B.contiguous())].long()

    def prototypes_of(self, student: str, teacher: str) -> Tensor:
        """[K, P]: what a student is drawn to."""
        return self.prototypes.get(f"{student}/{teacher}", self.centers[teacher])

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the ids, for a file."""
        named = {"number": torch.tensor([self.number])}
        for kind in ("labels", "centers", "prototypes", "objectives", "empty"):
            named |= {f"{kind}.{name}": tensor for name, tensor in getattr(self, kind).items()}
        return named

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], ids_of: Callable[[int], Tensor], where: str) -> Episode:
        """From `tensors()`; `ids_of` gives an episode's ids, on the device. UserError where they do not fit."""
        number = int(tensors["number"])
        ids_N = ids_of(number)
        kinds: dict[str, dict[str, Tensor]] = {
            kind: {} for kind in ("labels", "centers", "prototypes", "objectives", "empty")
        }
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind in kinds:
                kinds[kind][name] = tensor.to(ids_N.device)
        for teacher, labels_N in kinds["labels"].items():
            if labels_N.shape != ids_N.shape:
                raise UserError(
                    f"{where}: labels.{teacher} has shape {list(labels_N.shape)} instead of {list(ids_N.shape)}: it is "
                    "of another objective.episode_samples."
                )
        return cls(number, ids_N, **kinds)


@dataclass(frozen=True)
class Clusterer:
    """How an episode's samples are clustered, over `group`; ranks of `peers`, if any, hold the same samples."""

    num_clusters: int
    num_iterations: int
    num_restarts: int
    has_back_translation: bool
    seed: int
    group: Group
    peers: Group | None

    def make(self, number: int, ids_N: Tensor, features: Mapping[str, Tensor], external: Tensor | None) -> Episode:
        """`features`: this rank's share of the students' unit rows [n, P], by tower; `external`: of an external
        teacher's rows. The same on all ranks. Collectives: those of `cluster_rows` for each teacher; and all-gathers of
        labels, all-reduces of [K, P] for each prototype."""
        share = Share.of(len(ids_N), self.group)
        rows = dict(features) if external is None else {**features, "external": external}
        labels, centers, prototypes, objectives, empty = ({} for _ in range(5))
        for place, (teacher, rows_NE) in enumerate(rows.items()):
            # Different for every episode, teacher and start.
            states = np.random.SeedSequence([self.seed, number, place]).generate_state(self.num_restarts)
            found, own_N = cluster_rows(
                rows_NE, share, self.group, self.num_clusters, self.num_iterations, [int(state) for state in states]
            )
            centers_KP = self._agreed(found.centers_CE)
            labels_N = self._agreed(share.gather(own_N, self.group))
            kept_K = torch.bincount(labels_N, minlength=self.num_clusters) > 0
            labels_N = (kept_K.cumsum(0) - 1)[labels_N]
            labels[teacher], centers[teacher] = labels_N.int(), centers_KP[kept_K]
            objectives[teacher] = torch.tensor(found.objective[-1], dtype=torch.float64)
            empty[teacher] = 1 - kept_K.float().mean()
            own = slice(share.first, share.first + share.count)
            students = [name for name, other in STUDENTS.items() if teacher in (other, "external")]
            for student in students if self.has_back_translation else ():
                means_KP = self._means(features[student], labels_N[own], len(centers[teacher]))
                prototypes[f"{student}/{teacher}"] = means_KP
        return Episode(number, ids_N, labels, centers, prototypes, objectives, empty)

    def _means(self, rows_NP: Tensor, labels_N: Tensor, num_clusters: int) -> Tensor:
        """Back translation: a student's mean row [K, P] in each cluster of a teacher."""
        sums_KP = rows_NP.new_zeros(num_clusters, rows_NP.shape[1]).index_add_(0, labels_N, rows_NP)
        counts_K = torch.bincount(labels_N, minlength=num_clusters).to(rows_NP.dtype)
        self.group.all_reduce_sum(sums_KP)
        return self._agreed(sums_KP / self.group.all_reduce_sum(counts_K)[:, None])

    def _agreed(self, tensor: Tensor) -> Tensor:
        """The first peer's: on a GPU sums by cluster round differently each time."""
        return tensor if self.peers is None else self.peers.all_gather(tensor[None])[0]


def save_state(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the objective's file. Raises OSError where that cannot be done."""
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / NAME)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_state(folder: Path) -> dict[str, Tensor]:
    """The objective's file. UserError where it is damaged."""
    return read_tensors(folder / NAME, f"Remove {folder} to use an older checkpoint.")
