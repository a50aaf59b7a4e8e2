"""Cluster the embeddings: spherical k-means over any number of ranks.

Writes the unit centres (`centers.npy`, fp32 [C, E]). The state is saved after every iteration; the same command,
run again on the same or another number of ranks, goes on from there.

  mlcd cluster --embeddings runs/laion/embeddings --num-centers 1000000 --out runs/laion/clusters
  torchrun --nnodes 8 --nproc_per_node 8 -m mlcd_ds.cluster ...

The next stage is `mlcd assign`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this folder's names must not shadow top-level packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from tqdm import tqdm

from mlcd_ds import stage
from mlcd_ds.by_shard import work_key
from mlcd_ds.clustering.assigners import FaissAssigner
from mlcd_ds.clustering.center_store import ClusterManifest
from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.clustering.kmeans import Clustering, initial_clustering, kmeans
from mlcd_ds.errors import UserError
from mlcd_ds.manifest import library_versions, write_atomic, write_manifest

STATE_NAME = "state.safetensors"


class Options(stage.StageOptions):
    """Options of `mlcd cluster`."""

    embeddings: Path = Field(description="folder of `mlcd embed`")
    num_centers: int = Field(ge=2, description="number of clusters (the paper: 1,000,000 for 400M images)")
    num_iterations: int = Field(20, ge=1, description="Lloyd iterations (not published; faiss's default is 25)")
    seed: int = Field(0, ge=0, description="seed of the first centres and of the splits of empty clusters")


def save_state(path: Path, key: str, clustering: Clustering) -> None:
    """Write centres, counts and history atomically."""
    history = {"key": key, "objective": clustering.objective, "num_splits": clustering.num_splits}
    tensors = {"centers": clustering.centers_CE, "counts": clustering.counts_C}
    write_atomic(path, lambda file: file.write(save_tensors(tensors, {"history": json.dumps(history)})))


def load_state(path: Path, key: str) -> Clustering | None:
    """The saved state of this very clustering, or None. Raises UserError when the file is damaged."""
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        history = json.loads(header["__metadata__"]["history"])
        if history["key"] != key:
            return None
        tensors = load_tensors(content)
    except (ValueError, KeyError, SafetensorError):
        raise UserError(f"{path} is damaged. Pass --overwrite to begin from the first iteration.") from None
    return Clustering(tensors["centers"], tensors["counts"], tuple(history["objective"]), tuple(history["num_splits"]))


def run(options: Options, context: stage.Context) -> None:
    """Cluster over all ranks; rank 0 writes."""
    group, state_path = context.group, options.out / STATE_NAME
    store = EmbeddingStore(options.embeddings, group.rank, group.size)
    if options.num_centers > store.num_rows:
        raise UserError(f"--num-centers {options.num_centers} is more than the {store.num_rows} images: choose fewer.")
    wanted = ClusterManifest(
        stage="cluster",
        parameters=options.model_dump(mode="json", include={"num_centers", "num_iterations", "seed"}),
        inputs={"embeddings": store.manifest.fingerprint},
        files={},
        versions=library_versions(),
        num_images=store.num_rows,
        num_centers=options.num_centers,
        dim=store.dim,
        objective=(),
        num_splits=(),
    )
    if stage.already_done(options, context, ClusterManifest, wanted):
        return
    stage.logger.info("cluster: %d x %d into %d -> %s", store.num_rows, store.dim, options.num_centers, options.out)
    if options.dry_run:
        return
    # The number of iterations is not part of the key: an interrupted run may go on to another number of them.
    key = work_key("cluster", options.num_centers, options.seed, wanted.inputs)
    start = None if options.overwrite else load_state(state_path, key)
    if start is None or start.num_iterations > options.num_iterations:
        start = initial_clustering(store, group, options.num_centers, options.seed)
    bar = tqdm(
        total=options.num_iterations,
        initial=start.num_iterations,
        desc="cluster",
        disable=not (group.is_main and sys.stderr.isatty()),
    )

    def after_iteration(now: Clustering) -> None:
        if group.is_main:
            save_state(state_path, key, now)
        bar.update()
        bar.set_postfix(similarity=f"{now.objective[-1]:.4f}", split=now.num_splits[-1])

    assigner = FaissAssigner(store.dim, use_gpu=context.device.type == "cuda")
    result = kmeans(store, group, assigner, start, options.num_iterations, options.seed, after_iteration)
    bar.close()
    if group.is_main:
        record = write_atomic(options.out / "centers.npy", lambda file: np.save(file, result.centers_CE))
        manifest = wanted.model_copy(
            update={
                "files": {"centers.npy": record},
                "objective": result.objective,
                "num_splits": result.num_splits,
            }
        )
        write_manifest(options.out, manifest)
        stage.logger.info(
            "cluster: mean similarity to the nearest centre %.4f -> %.4f in %d iterations",
            result.objective[0],
            result.objective[-1],
            result.num_iterations,
        )
    group.barrier()


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd cluster` and `python -m mlcd_ds.cluster`."""
    return stage.main("cluster", Options, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
