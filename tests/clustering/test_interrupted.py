"""`mlcd cluster` killed, stopped and started again: the same result on any number of ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from embeddings_maker import blobs, write_embeddings

from mlcd_ds.artefacts.manifest import MANIFEST_NAME
from mlcd_ds.clustering import embedding_store
from mlcd_ds.clustering.center_store import CenterStore, ClusterManifest
from mlcd_ds.clustering.kmeans import Clustering, Iteration
from mlcd_ds.clustering.kmeans_state import STATE_NAME, load_state, save_state
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.stopping import EXIT_REQUEUE, StopRequest
from mlcd_ds.errors import UserError
from mlcd_ds.stages import cluster as cluster_stage
from mlcd_ds.stages.cluster import Options, cluster, parameters_of, state_key
from mlcd_ds.stages.runner import Context

TOLERANCE = 1e-6
NUM_ITERATIONS, OPENS = 6, 3  # numpy opens a file so often to map it


def options_of(folder: Path, out: str, **changed: object) -> Options:
    # Random first centres open a shard once (see `run_and_die`).
    given = {
        "init": "random",
        "num_centers": 13,
        "num_iterations": NUM_ITERATIONS,
        "full_iterations": 3,
        "points_per_center": (30,),
    }
    return Options(embeddings=folder / "embeddings", out=folder / out, **{**given, "tolerance": 0, **changed})


def run(group: Group, options: Options, at: Callable[[str, tuple[Any, ...]], None] | None = None) -> int:
    """The stage on this rank, which saves after each iteration; `at` is called with Python's audit events."""
    cluster_stage.SAVE_EVERY_S = 0.0
    if at is not None:
        sys.addaudithook(at)
    with StopRequest() as stop:
        return cluster(options, Context(group, torch.device("cpu")), stop)


def run_and_die(group: Group, options: Options, victim: int, iteration: int) -> int:
    """One rank kills itself while it reads embeddings in an iteration (the first is 1) of this start."""
    embedding_store.KEPT_BYTES = 0  # so that every iteration reads
    # Opened before: for its checksum, and for the first centres where there is no state.
    before = 1 + (0 if (options.out / STATE_NAME).exists() else OPENS)
    left = before + OPENS * (iteration - 1)

    def at(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open" and str(args[0]).endswith("00004.npy") and group.rank == victim:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return run(group, options, at)


def run_and_stop(group: Group, options: Options) -> int:
    """Rank 0 is asked to stop as it writes its second state: it stops, and saves, after the third iteration."""
    seen = [0]

    def at(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(args[1]).endswith(STATE_NAME):
            seen[0] += 1
            if seen[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    return run(group, options, at)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lone_group: Group) -> Path:
    """Embeddings, and the result of a run in peace in `peace`."""
    path = tmp_path_factory.mktemp("interrupted")
    write_embeddings(path / "embeddings", blobs((301, 1, 118, 0, 402), dim=24, num_blobs=9))
    assert run(lone_group, options_of(path, "peace")) == 0
    return path


def assert_same_result(folder: Path, out: str) -> None:
    got, wanted = CenterStore(folder / out), CenterStore(folder / "peace")
    assert_close("centres", torch.tensor(got.centers_CE), torch.tensor(wanted.centers_CE), TOLERANCE)
    objectives = [torch.tensor(store.manifest.objective) for store in (got, wanted)]
    assert_close("objective", *objectives, TOLERANCE)
    assert_differs("objective, an iteration late", objectives[0][1:], objectives[1][:-1], TOLERANCE)
    assert got.manifest.num_rows == wanted.manifest.num_rows and len(got.manifest.objective) == NUM_ITERATIONS
    assert got.manifest.num_rows[0] < got.manifest.num_rows[-1] == 822


def test_a_rank_killed_in_any_iteration(folder: Path, lone_group: Group) -> None:
    """Killed again and again, each time on another number of ranks."""
    options, done = options_of(folder, "killed"), []
    for num_ranks, iteration in ((2, 1), (3, 2), (2, 2), (3, 3)):
        with pytest.raises(RuntimeError):  # of a peer that lost it, or of its exit code
            run_ranks(run_and_die, num_ranks, options, num_ranks - 1, iteration)
        assert not (options.out / MANIFEST_NAME).exists()
        state = options.out / STATE_NAME
        done.append(len(load_state(state, key_of(options)).history) if state.exists() else 0)
    assert done == [0, 1, 2, 4], "each start is meant to get on by one iteration less than it dies in"
    assert run(lone_group, options) == 0
    assert_same_result(folder, "killed")


def test_asked_to_stop_it_saves_and_says_so(folder: Path, lone_group: Group) -> None:
    options = options_of(folder, "stopped")
    assert run_ranks(run_and_stop, 2, options) == [EXIT_REQUEUE, EXIT_REQUEUE]
    assert len(load_state(options.out / STATE_NAME, key_of(options)).history) == 3
    assert not (options.out / MANIFEST_NAME).exists()
    assert run(lone_group, options) == 0
    assert_same_result(folder, "stopped")


def test_short_iterations_are_saved_together(folder: Path, lone_group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only at the end, where the iterations take less than the interval; and when asked to stop."""
    saved: list[int] = []
    monkeypatch.setattr(cluster_stage, "save_state", lambda path, key, now: saved.append(len(now.history)))
    for interval, wanted in ((0.0, [*range(1, NUM_ITERATIONS + 1)]), (1e6, [NUM_ITERATIONS])):
        monkeypatch.setattr(cluster_stage, "SAVE_EVERY_S", interval)
        saved.clear()
        with StopRequest() as stop:
            context = Context(lone_group, torch.device("cpu"))
            assert cluster(options_of(folder, f"every{interval}"), context, stop) == 0
        assert saved == wanted
    saved.clear()
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert cluster(options_of(folder, "asked"), Context(lone_group, torch.device("cpu")), stop) == EXIT_REQUEUE
    assert saved == [1]


def key_of(options: Options) -> str:
    inputs = CenterStore(options.out.parent / "peace").manifest.inputs
    return state_key(options, inputs, 2)


# The state


def make_clustering() -> Clustering:
    generator = torch.Generator().manual_seed(0)
    history = (Iteration(0, 0.5, 100, 3), Iteration(1, 0.6, 200, 0))
    return Clustering(torch.randn(5, 3, generator=generator), np.arange(5), history)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    saved = make_clustering()
    save_state(tmp_path / STATE_NAME, "key", saved)
    loaded = load_state(tmp_path / STATE_NAME, "key")
    assert torch.equal(loaded.centers_CE, saved.centers_CE) and np.array_equal(loaded.counts_C, saved.counts_C)
    assert loaded.history == saved.history
    assert load_state(tmp_path / STATE_NAME, "of other embeddings") is None
    assert load_state(tmp_path / "none", "key") is None


def test_every_damage_to_a_state_is_found(tmp_path: Path) -> None:
    path = tmp_path / STATE_NAME
    save_state(path, "key", make_clustering())
    sound = path.read_bytes()
    begin = 8 + int.from_bytes(sound[:8], "little")
    for place in range(begin, len(sound)):  # a bit of any tensor
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(UserError, match=r"state\.safetensors is damaged.*--overwrite"):
            load_state(path, "key")
    path.write_bytes(sound.replace(b"0.5", b"0.7"))
    with pytest.raises(UserError, match="damaged"):
        load_state(path, "key")


def test_what_the_key_depends_on(tmp_path: Path) -> None:
    base = options_of(tmp_path, "out", num_iterations=20, init="auto")
    keys = {state_key(options_of(tmp_path, "out", **c), {}, 1) for c in ({"seed": 1}, {"metric": "euclidean"}, {})}
    assert len(keys) == 3
    more = options_of(tmp_path, "out", num_iterations=50, init="auto", assigner="faiss", precision="bf16")
    assert state_key(more, {}, 1) == state_key(base, {}, 1), "more iterations go on, and so does another assigner"
    assert state_key(more, {}, 2) != state_key(base, {}, 2), "the borders of phases would move"
    few = options_of(tmp_path, "out", num_iterations=3)
    assert state_key(few, {}, 1) != state_key(base, {}, 1), "no centre moved so shortly before the end"
    assert "assigner" not in parameters_of(base)
    named = options_of(tmp_path, "out", num_iterations=20, init="kmeans++")
    assert parameters_of(base) == parameters_of(named), "what auto chose is recorded"
    assert parameters_of(base) != parameters_of(options_of(tmp_path, "out", num_iterations=20))


def test_a_manifest_of_before_is_read(folder: Path) -> None:
    content = CenterStore(folder / "peace").manifest.model_dump()
    for name in ("metric", "num_rows"):
        del content[name]
    assert ClusterManifest(**content).metric == "cosine"


@pytest.mark.parametrize(
    ("changed", "match"),
    [({"max_size": 10}, "--max-size 10"), ({"min_size": 100}, "--min-size 100"), ({"num_centers": 900}, "900")],
)
def test_sizes_that_cannot_be_are_refused(folder: Path, lone_group: Group, changed: dict[str, int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        run(lone_group, options_of(folder, "none", **changed))


def test_sizes_come_within_their_limits(folder: Path, lone_group: Group) -> None:
    free = options_of(folder, "free", num_iterations=25, points_per_center=())
    bound = options_of(folder, "bound", num_iterations=25, points_per_center=(), min_size=40, max_size=90)
    spread = []
    for options in (free, bound):
        assert run(lone_group, options) == 0
        counts = load_state(options.out / STATE_NAME, state_key(options, CenterStore(options.out).manifest.inputs, 1))
        spread.append(counts.counts_C.max() - counts.counts_C.min())
    assert spread[1] < spread[0], "the limits are meant to even sizes out"
