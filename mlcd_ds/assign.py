"""Label every image with its nearest centres: the multi-label targets of MLCD (paper, 3.2; eight a image).

Writes one file a shard beside the shards, which stay as they are: `NAME.npy`, int32 [n, P], nearest first, in index
order; and `sizes.npy`, int64 [C], the number of images whose nearest centre each centre is.

  mlcd assign --embeddings runs/laion/embeddings --clusters runs/laion/clusters --out runs/laion/labels

The next stage is `mlcd train`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this folder's names must not shadow top-level packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from pydantic import Field

from mlcd_ds import stage
from mlcd_ds.by_shard import for_each_shard, work_key
from mlcd_ds.clustering.assigners import Assigner, FaissAssigner
from mlcd_ds.clustering.center_store import CenterStore
from mlcd_ds.clustering.embedding_store import EmbeddingManifest
from mlcd_ds.data.label_store import LabelManifest
from mlcd_ds.errors import UserError
from mlcd_ds.manifest import check_file, library_versions, read_manifest, write_atomic, write_manifest

BLOCK_ROWS = 65_536


class Options(stage.StageOptions):
    """Options of `mlcd assign`."""

    embeddings: Path = Field(description="folder of `mlcd embed`")
    clusters: Path = Field(description="folder of `mlcd cluster`")
    num_labels: int = Field(8, ge=1, description="labels an image (the paper's best: 8)")


def nearest_centers(assigner: Assigner, rows_NE: np.ndarray, num_labels: int) -> np.ndarray:
    """int32 [N, P]: the nearest centres of each row, nearest first."""
    blocks = [np.empty((0, num_labels), np.int32)]
    for begin in range(0, len(rows_NE), BLOCK_ROWS):
        rows_BE = torch.from_numpy(rows_NE[begin : begin + BLOCK_ROWS].astype(np.float32))
        _, labels_BP = assigner.search(rows_BE, num_labels)
        blocks.append(labels_BP.int().cpu().numpy())
    return np.concatenate(blocks)


def run(options: Options, context: stage.Context) -> None:
    """Label all shards over all ranks; rank 0 writes the manifest."""
    group = context.group
    embeddings = read_manifest(options.embeddings, EmbeddingManifest, "embed")
    store = CenterStore(options.clusters)
    clusters = store.manifest
    if clusters.dim != embeddings.dim:
        raise UserError(
            f"{options.clusters} has centres of dimension {clusters.dim}, {options.embeddings} embeddings of "
            f"{embeddings.dim}: they are of different encoders. Cluster these embeddings, or embed with that encoder."
        )
    if options.num_labels > clusters.num_centers:
        raise UserError(f"--num-labels {options.num_labels} is more than the {clusters.num_centers} centres.")
    wanted = LabelManifest(
        stage="assign",
        parameters={"num_labels": options.num_labels},
        inputs={
            "index": embeddings.inputs["index"],
            "embeddings": embeddings.fingerprint,
            "clusters": clusters.fingerprint,
        },
        files={},
        versions=library_versions(),
        num_images=embeddings.num_images,
        num_labels=options.num_labels,
        num_centers=clusters.num_centers,
    )
    if stage.already_done(options, context, LabelManifest, wanted):
        return
    stage.logger.info("assign: %d images x %d labels -> %s", embeddings.num_images, options.num_labels, options.out)
    if options.dry_run:
        return
    assigner = FaissAssigner()
    assigner.set_centers(torch.from_numpy(np.array(store.centers_CE)))

    def work(name: str) -> tuple[dict, dict]:
        path = check_file(options.embeddings, f"{name}.npy", embeddings.files[f"{name}.npy"], "embed")
        labels_NP = nearest_centers(assigner, np.load(path, mmap_mode="r", allow_pickle=False), options.num_labels)
        return {f"{name}.npy": write_atomic(options.out / f"{name}.npy", lambda file: np.save(file, labels_NP))}, {}

    key = work_key("assign", wanted.parameters, wanted.inputs)
    names = [name for name, _ in embeddings.shards]
    notes = for_each_shard(context, options.out, dict.fromkeys(names, key), work, "assign", redo=options.overwrite)
    sizes_C = torch.zeros(clusters.num_centers, dtype=torch.int64)
    for name in context.mine(names):
        nearest_N = np.load(options.out / f"{name}.npy", mmap_mode="r", allow_pickle=False)[:, 0]
        sizes_C += torch.bincount(torch.from_numpy(nearest_N.astype(np.int64)), minlength=clusters.num_centers)
    group.all_reduce_sum(sizes_C)
    if group.is_main:
        files = {name: record for note in notes.values() for name, record in note.files.items()}
        files["sizes.npy"] = write_atomic(options.out / "sizes.npy", lambda file: np.save(file, sizes_C.numpy()))
        write_manifest(options.out, wanted.model_copy(update={"files": files}))
        low, middle, high = np.percentile(sizes_C.numpy(), (5, 50, 95))
        stage.logger.info(
            "assign: images a centre: %d empty, 5%% have %d or fewer, median %d, 95%% have %d or fewer, largest %d",
            int((sizes_C == 0).sum()),
            low,
            middle,
            high,
            int(sizes_C.max()),
        )
    group.barrier()


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd assign` and `python -m mlcd_ds.assign`."""
    return stage.main("assign", Options, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
