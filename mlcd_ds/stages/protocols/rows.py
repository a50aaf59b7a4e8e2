"""Features and embeddings of an index's samples: computed shard by shard, then dealt over the ranks.

n rows on this rank, N on all; D feature channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.artefacts.files import write_array
from mlcd_ds.artefacts.html_page import thumbnail
from mlcd_ds.data.dali import EvaluationDecoder
from mlcd_ds.data.loader import shard_images
from mlcd_ds.data.sample_captions import shard_captions
from mlcd_ds.data.sample_labels import shard_labels
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.encoders.base import Encoder, TextEncoder
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.stages.per_shard import ShardNote, ShardWork, for_each_shard, read_shard, work_key
from mlcd_ds.stages.runner import Context

UNLABELLED = -1


@dataclass(frozen=True)
class Rows:
    """What the shards' work has left in a folder, as one array of each kind; rows are in index order.

    NAME.npy are features, NAME.rows.npy their samples' rows in the shard, NAME.labels.npy their labels, if any.
    """

    index: ShardIndex
    folder: Path
    notes: Mapping[str, ShardNote]  # by the shard's name, of all shards

    @property
    def count(self) -> int:
        return sum(note.summary["num_rows"] for note in self.notes.values())

    def read(self, kind: str, part: slice) -> np.ndarray:
        """The rows in `part` of all shards; `kind` is "", "rows" or "labels". Checksums are compared."""
        end_of_name = f".{kind}.npy" if kind else ".npy"
        pieces, first = [], 0
        for name, note in self.notes.items():
            begin, end = part.start - first, part.stop - first
            first += note.summary["num_rows"]
            if begin < note.summary["num_rows"] and end > 0:
                pieces.append(read_shard(self.folder, name + end_of_name, note)[max(begin, 0) : end])
        if pieces:
            return np.concatenate(pieces)
        width = next(iter(self.notes.values())).summary["width"]
        return np.zeros((0, width), np.float32) if not kind else np.zeros(0, np.int64)

    def own(self, kind: str, ranks: Ranks, device: torch.device) -> Tensor:
        """This rank's share."""
        return torch.from_numpy(self.read(kind, ranks.share(self.count))).to(device)

    def all(self, kind: str) -> np.ndarray:
        """Those of all ranks; not for features."""
        return self.read(kind, slice(0, self.count))

    def samples(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Shard and row in it of some rows."""
        number_of = {entry.name: number for number, entry in enumerate(self.index.shards)}
        ends = np.cumsum([note.summary["num_rows"] for note in self.notes.values()])
        names, found = list(self.notes), []
        for number in numbers:
            place = int(np.searchsorted(ends, number, side="right"))
            row = self.read("rows", slice(number, number + 1))[0]
            found.append((number_of[names[place]], int(row)))
        return found

    def thumbnails(self, numbers: Sequence[int]) -> list[str]:
        """Small pictures of some rows' samples, as data URIs."""
        reader = ShardReader(self.index)
        try:
            samples = self.samples(numbers)
            return [thumbnail(reader.read(shard, self.index.samples(shard).image, row)) for shard, row in samples]
        finally:
            reader.close()


@dataclass(frozen=True)
class Computing:
    """How rows are computed."""

    context: Context
    batch_size: int
    num_threads: int
    is_redone: bool

    def images(
        self, encoder: Encoder, weights: str, index: ShardIndex, folder: Path, label_key: str | None, labelled: bool
    ) -> Rows:
        """Features fp32 [N, D] of all images of an index or, `labelled`, of those with a label. All ranks see all."""
        decoder = EvaluationDecoder(self.batch_size, encoder.pixels, self.context.device, self.num_threads)
        numbers = _numbers(index)

        def work(name: str) -> tuple[dict, dict]:
            number = numbers[name]
            labels_N = np.full(index.counts[number], UNLABELLED, np.int64)
            if label_key is not None:
                labels_N = shard_labels(index, number, label_key)
            with torch.inference_mode():
                batches = shard_images(index, number, decoder)
                features_ND = np.concatenate([encoder.encode(images).float().cpu().numpy() for images in batches])
            rows = np.flatnonzero(labels_N != UNLABELLED) if labelled else np.arange(len(labels_N))
            return _written(folder, name, {"": features_ND[rows], "labels": labels_N[rows], "rows": rows})

        key = work_key("evaluate 2", weights, encoder.pixels, index.manifest.fingerprint, label_key, labelled)
        return self._rows(index, folder, dict.fromkeys(numbers, key), work)

    def captions(self, texts: TextEncoder, weights: str, index: ShardIndex, folder: Path) -> Rows:
        """Embeddings fp32 [T, E] of all captions of an index; `rows` are those of their images. All ranks see all.

        UserError for a sample without a caption.
        """
        numbers = _numbers(index)

        def work(name: str) -> tuple[dict, dict]:
            captions, rows = shard_captions(index, numbers[name])
            blocks = []
            with torch.inference_mode():
                for begin in range(0, len(captions), self.batch_size):
                    blocks.append(texts.encode(captions[begin : begin + self.batch_size]).float().cpu().numpy())
            return _written(folder, name, {"": np.concatenate(blocks), "rows": rows})

        key = work_key("evaluate captions", weights, index.manifest.fingerprint)
        return self._rows(index, folder, dict.fromkeys(numbers, key), work)

    def _rows(self, index: ShardIndex, folder: Path, keys: dict[str, str], work: ShardWork) -> Rows:
        what = f"features {folder.name}"
        return Rows(index, folder, for_each_shard(self.context, folder, keys, work, what, self.is_redone, True))


def _numbers(index: ShardIndex) -> dict[str, int]:
    """Number by name of each shard that has images."""
    return {entry.name: number for number, entry in enumerate(index.shards) if entry.num_images}


def _written(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
    """Files and summary of a shard."""
    ends = {f"{name}.{kind}.npy" if kind else f"{name}.npy": array for kind, array in arrays.items()}
    files = {file: write_array(folder / file, array) for file, array in ends.items()}
    return files, {"num_rows": len(arrays[""]), "width": arrays[""].shape[1]}


def refuse_unlabelled(rows: Rows, label_key: str) -> None:
    """UserError where no row has a label."""
    if not (rows.all("labels") != UNLABELLED).any():
        raise UserError(
            f"{rows.index.folder}: no sample has a label under {label_key!r}, nor a .cls member. Name another "
            "--label-key."
        )


def refuse_not_finite(rows_nD: Tensor, ranks: Ranks, what: str) -> None:
    """UserError where any rank has NaN or infinity. One all-reduce."""
    if ranks.total(float(not rows_nD.isfinite().all()), rows_nD.device):
        raise UserError(f"{what} of NaN or infinity: evaluate another checkpoint.")
