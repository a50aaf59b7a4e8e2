"""Cluster the embeddings: k-means over any number of ranks, spherical or euclidean.

Writes the centres (`centers.npy`, fp32 [C, E]). The state is saved after every iteration (of short ones, every two
seconds); the same command, run again on the same or another number of ranks, goes on from there. Asked to stop
(SIGTERM, SIGUSR1), it finishes the iteration, saves it, and ends with status 85.

  mlcd cluster --embeddings runs/laion/embeddings --num-centers 1000000 --out runs/laion/clusters
  torchrun --nnodes 8 --nproc_per_node 8 -m mlcd_ds cluster ...

docs/clustering.md explains the options. The next stage is `mlcd assign`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field, NonNegativeInt
from tqdm import tqdm

from mlcd_ds.artefacts.files import write_array
from mlcd_ds.artefacts.manifest import library_versions, write_manifest
from mlcd_ds.clustering.assigner import Assigner, AssignerName, Metric, Precision
from mlcd_ds.clustering.center_store import ClusterManifest
from mlcd_ds.clustering.choose_assigner import choose_assigner, describe_assigner, resolve_precision
from mlcd_ds.clustering.duplicates import find_duplicates
from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.clustering.first_centers import InitName, first_centers, resolve_init
from mlcd_ds.clustering.kmeans import Clustering, Rules, kmeans, make_phases, next_phase
from mlcd_ds.clustering.kmeans_memory import memory_table
from mlcd_ds.clustering.kmeans_state import STATE_NAME, load_state, save_state
from mlcd_ds.clustering.repair import Repair
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.stopping import EXIT_REQUEUE, StopRequest
from mlcd_ds.errors import UserError
from mlcd_ds.stages import runner
from mlcd_ds.stages.per_shard import work_key

SETTLING_ITERATIONS = 5
SAVE_EVERY_S = 2.0  # iterations that are shorter are not worth a file each


class Options(runner.StageOptions):
    """Options of `mlcd cluster`."""

    embeddings: Path = Field(description="folder of `mlcd embed`")
    num_centers: int = Field(ge=2, description="number of clusters (the paper: 1,000,000 for 400M images)")
    num_iterations: int = Field(
        20, ge=1, le=10**6, description="Lloyd iterations at most (not published; faiss's default is 25)"
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="seed of the first centres, of samples, and of the splits of empty clusters"
    )
    metric: Metric = Field("cosine", description="cosine (unit centres) or euclidean")
    init: InitName = Field(
        "auto", description="first centres; auto: kmeans++ up to 1,000, two_level from 20,000 centres"
    )
    moving_iterations: int = Field(
        10, ge=0, description="first iterations in which centres move from cheap clusters to expensive ones"
    )
    points_per_center: tuple[NonNegativeInt, ...] = Field(
        (64,), description="rows a centre of growing samples for the first iterations; 0, or where N is smaller: all"
    )
    full_iterations: int = Field(4, ge=1, description="of the iterations, those on all rows after samples")
    tolerance: float = Field(3e-4, ge=0, description="a phase ends when its distortion falls by less than this share")
    duplicates_above: float | None = Field(
        None, gt=0.5, le=1, description="leave out images whose cosine to an earlier one is at least this, such as 0.98"
    )
    min_size: int = Field(1, ge=1, description="clusters with fewer images are dissolved (an aim, see docs)")
    max_size: int | None = Field(None, ge=2, description="clusters with more images are split (an aim, see docs)")
    assigner: AssignerName = Field("auto", description="what finds the nearest centres")
    precision: Precision = Field("auto", description="of the products; auto is bf16 where that is fast and work large")


def parameters_of(options: Options) -> dict:
    """What the centres depend on: all options but those that say how they are computed (assigner, precision)."""
    names = {"embeddings", "out", "dry_run", "overwrite", "assigner", "precision"}
    parameters = options.model_dump(mode="json", exclude=names)
    return {**parameters, "init": resolve_init(options.init, options.num_centers)}


def state_key(options: Options, inputs: dict[str, str], num_phases: int) -> str:
    """What a saved state must agree with. An interrupted run may go on to another number of iterations, unless that
    moves the borders of phases."""
    free = {"num_iterations", "tolerance"} if num_phases == 1 else {"tolerance"}
    kept = {k: v for k, v in parameters_of(options).items() if k not in free}
    return work_key("cluster", {**kept, "moving_iterations": moving_iterations(options)}, inputs)


def moving_iterations(options: Options) -> int:
    """Iterations in which centres may move; enough are left afterwards to settle."""
    return max(0, min(options.moving_iterations, options.num_iterations - SETTLING_ITERATIONS))


def run(options: Options, context: runner.Context) -> int:
    """Cluster over all ranks; rank 0 writes."""
    with StopRequest() as stop:
        return cluster(options, context, stop)


def cluster(options: Options, context: runner.Context, stop: StopRequest) -> int:
    """Returns the exit status: EXIT_REQUEUE when it was asked to stop before the end."""
    group, device = context.group, context.device
    store = EmbeddingStore(options.embeddings, group.rank, group.size)
    check_numbers(options, store.num_rows)
    wanted = manifest_of(options, store)
    if runner.already_done(options, context, ClusterManifest, wanted):
        return 0
    is_bf16 = resolve_precision(options.precision, device, store.num_rows * options.num_centers * store.dim)
    searcher = describe_assigner(options.assigner, device, is_bf16)
    shape = (store.num_rows, store.dim, options.num_centers)
    runner.logger.info("cluster: %d x %d into %d by %s -> %s", *shape, searcher, options.out)

    def make_assigner() -> Assigner:
        return choose_assigner(options.assigner, options.metric, device, is_bf16)

    assigner = make_assigner()
    duplicates = None if options.dry_run else leave_out_duplicates(options, store, group)
    rules = make_rules(options, store.num_rows)
    if options.dry_run:
        shape = (store.num_rows, options.num_centers, store.dim)
        runner.logger.info("%s", memory_table(*shape, group.size, rules.phases, device.type, is_bf16))
        return 0
    state_path, key = options.out / STATE_NAME, state_key(options, wanted.inputs, len(rules.phases))
    start = None if options.overwrite else load_state(state_path, key)
    is_new = start is None or start.num_iterations > options.num_iterations
    # All go by the first rank's view: on a network file system another may not see the state yet.
    if group.gather_objects(is_new)[0]:
        first_CE = first_centers(
            options.init, store, group, options.num_centers, options.metric, options.seed, make_assigner, device
        )
        start = Clustering(first_CE, np.zeros(options.num_centers, dtype=np.int64))
    elif start is None:
        raise UserError(f"{state_path} is not visible to rank {group.rank}: --out must be a shared folder.")
    bar = tqdm(
        total=options.num_iterations,
        initial=start.num_iterations,
        desc="cluster",
        disable=not (group.is_main and sys.stderr.isatty()),
    )

    saved_at = time.monotonic()

    def after_iteration(now: Clustering) -> bool:
        nonlocal saved_at
        is_asked = stop.is_asked(group)
        is_end = is_asked or next_phase(now.history, rules) is None
        if group.is_main and (is_end or time.monotonic() - saved_at >= SAVE_EVERY_S):
            save_state(state_path, key, now)
            saved_at = time.monotonic()
        bar.update()
        bar.set_postfix(objective=f"{now.objective[-1]:.4f}", split=now.num_splits[-1])
        return not is_asked

    start = replace(start, centers_CE=start.centers_CE.to(device))
    result = kmeans(store, group, assigner, start, rules, after_iteration)
    bar.close()
    if next_phase(result.history, rules) is not None:
        runner.logger.info("cluster: asked to stop; iteration %d is saved: start again to go on", result.num_iterations)
        return EXIT_REQUEUE
    if group.is_main:
        finish(options.out, wanted, result, duplicates)
    group.barrier()
    return 0


def check_numbers(options: Options, num_rows: int) -> None:
    """UserError when the options cannot be met with so many images."""
    centers = options.num_centers
    if centers > num_rows:
        raise UserError(f"--num-centers {centers} is more than the {num_rows} images: choose fewer.")
    if options.max_size is not None and options.max_size * centers < num_rows:
        raise UserError(
            f"--max-size {options.max_size} times {centers} centres is less than the {num_rows} images: raise one."
        )
    if options.min_size * centers > num_rows:
        raise UserError(
            f"--min-size {options.min_size} times {centers} centres is more than the {num_rows} images: lower one."
        )


def manifest_of(options: Options, store: EmbeddingStore) -> ClusterManifest:
    """The manifest, without the results."""
    return ClusterManifest(
        stage="cluster",
        parameters=parameters_of(options),
        inputs={"embeddings": store.manifest.fingerprint},
        files={},
        versions=library_versions(),
        num_images=store.num_rows,
        num_centers=options.num_centers,
        dim=store.dim,
        metric=options.metric,
        objective=(),
        num_splits=(),
    )


def make_rules(options: Options, num_rows: int) -> Rules:
    """How these options iterate over so many rows."""
    phases = make_phases(
        num_rows, options.num_centers, options.num_iterations, options.points_per_center, options.full_iterations
    )
    repair = Repair(options.metric, options.min_size, options.max_size)
    return Rules(options.metric, phases, options.tolerance, repair, options.seed, moving_iterations(options))


def leave_out_duplicates(options: Options, store: EmbeddingStore, group: Group) -> np.ndarray | None:
    """Find near copies, where asked for, and have the store leave them out. Collective."""
    if options.duplicates_above is None:
        return None
    found = find_duplicates(store, group, options.duplicates_above, options.seed)
    runner.logger.info(
        "cluster: %d near copies left out of %d images, %.1f %%",
        len(found),
        store.num_rows,
        100 * len(found) / store.num_rows,
    )
    store.exclude(found)
    if options.num_centers > store.num_rows:
        raise UserError(
            f"--num-centers {options.num_centers} is more than the {store.num_rows} images without copies: choose "
            "fewer, or raise --duplicates-above."
        )
    return found


def finish(out: Path, wanted: ClusterManifest, result: Clustering, duplicates: np.ndarray | None) -> None:
    """Write the centres and the manifest, and log the result."""
    arrays = {"centers.npy": result.centers_CE.cpu().numpy()}
    if duplicates is not None:
        arrays["duplicates.npy"] = duplicates
    files = {name: write_array(out / name, array) for name, array in arrays.items()}
    history = {
        "objective": result.objective,
        "num_splits": result.num_splits,
        "num_rows": tuple(iteration.num_rows for iteration in result.history),
        "num_duplicates": 0 if duplicates is None else len(duplicates),
    }
    write_manifest(out, wanted.model_copy(update={"files": files, **history}))
    runner.logger.info(
        "cluster: mean %s the nearest centre %.4f -> %.4f in %d iterations",
        "similarity to" if wanted.metric == "cosine" else "squared distance from",
        result.objective[0],
        result.objective[-1],
        result.num_iterations,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd cluster`."""
    return runner.main("cluster", Options, run, __doc__, argv)
