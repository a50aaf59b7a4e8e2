"""Clustering against faiss: time to faiss's objective, the search for the nearest centres, what rounding costs.

  python benchmarks/clustering.py [--json FILE] [--only NAME ...]

Ratios of one run: ours on two ranks of one thread each against faiss on two threads. Squared distances are summed in
fp32 over all rows, the same way for both, after the clock is stopped. faiss has all rows in memory when its clock
starts; ours has them in files, but for a slice that one block holds.

  mixture    500,000 x 128, skewed components and 10 % copies, k = 5,000: time until faiss.Kmeans's final objective
             (25 iterations, its defaults, no sub-sampling) is reached; both final objectives; ours in bf16 on a CPU
             with AMX, elsewhere in fp32
  pictures   the embeddings of demo/shards, k = 64 and 256, three seeds: final objectives and times of `mlcd cluster`,
             over those of scikit-learn's and faiss's defaults and faiss's best options; the worse of the two k. Ours as
             it is started on such data, one process with two threads; `small_time_ratio_vs_faiss_two_ranks` is of two
  assign     20,000 rows x 16,384 centres, d = 768: top-1 and top-8 against faiss.knn
  precision  the objective after clustering with bf16 products, over that with fp32, other things equal
  memory     peak of a rank above what it held before, beside the formula of mlcd_ds/clustering/kmeans_memory.py
  by_gpus    memory and predicted time for N = 400M, d = 768, k = 1M on 8, 64 and 80 GPUs, by formula
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

if torch.backends.cpu.get_cpu_capability() == "AVX512":
    # The OpenBLAS inside of faiss-cpu mistakes new processors for old ones: faiss gets its full speed.
    os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
import faiss
import numpy as np
import sklearn.cluster
import torch.nn.functional as F
from head import launch, peak_memory, run_parts, seconds

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.artefacts.manifest import write_manifest
from mlcd_ds.clustering.assigner import Assigner
from mlcd_ds.clustering.blockwise import BlockwiseAssigner
from mlcd_ds.clustering.choose_assigner import choose_assigner
from mlcd_ds.clustering.embedding_store import EmbeddingManifest, EmbeddingStore
from mlcd_ds.clustering.first_centers import first_centers
from mlcd_ds.clustering.kmeans import Clustering, Rules, kmeans, make_phases
from mlcd_ds.clustering.kmeans_memory import cluster_memory, predicted_seconds
from mlcd_ds.clustering.repair import Repair
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.stages.cluster import Options

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
NUM_THREADS, NUM_RANKS, FAISS_ITERATIONS, OUR_ITERATIONS, ROUNDS = 2, 2, 25, 20, 5
PICTURE_CENTERS, PICTURE_SEEDS = (64, 256), (0, 1, 2)
FAST = "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"  # as `--precision auto` has it for long passes
TOLERANCE = Options.model_fields["tolerance"].default
MIB = 2**20
MIXTURE_ROWS, MIXTURE_DIM, MIXTURE_CENTERS = 500_000, 128, 5_000


def mixture(num_rows: int, dim: int, num_components: int, seed: int = 0) -> np.ndarray:
    """fp16 unit rows: components of Zipf-like sizes and different widths, and every tenth row a copy of another."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(10, num_components + 10) ** 0.8
    component = generator.choice(num_components, num_rows, p=weights / weights.sum())
    middles = generator.standard_normal((num_components, dim), dtype=np.float32)
    widths = generator.uniform(0.3, 1.0, num_components).astype(np.float32)
    rows = middles[component] + widths[component, None] * generator.standard_normal((num_rows, dim), dtype=np.float32)
    copies = generator.choice(num_rows, num_rows // 10, replace=False)
    rows[copies] = rows[generator.integers(num_rows, size=len(copies))]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_store(folder: Path, rows_NE: np.ndarray, num_shards: int = 7) -> Path:
    """Rows as a folder of `mlcd embed`, in uneven shards."""
    cuts = np.sort(np.random.default_rng(1).integers(len(rows_NE), size=num_shards - 1))
    folder.mkdir()
    shards = {f"{number:05d}": part for number, part in enumerate(np.split(rows_NE, cuts)) if len(part)}
    for name, part in shards.items():
        np.save(folder / f"{name}.npy", part)
    manifest = EmbeddingManifest(
        stage="embed",
        parameters={},
        inputs={"index": "of a benchmark"},
        files={f"{name}.npy": record_of(folder / f"{name}.npy") for name in shards},
        versions={},
        num_images=len(rows_NE),
        dim=rows_NE.shape[1],
        shards=[(name, len(part)) for name, part in shards.items()],
    )
    write_manifest(folder, manifest)
    return folder


def all_rows(folder: Path) -> torch.Tensor:
    """fp32, all of them."""
    return torch.cat([rows_BE.float() for _, rows_BE in EmbeddingStore(folder).blocks(65_536)])


def objective(rows_NE: torch.Tensor, centers_CE: torch.Tensor) -> float:
    """The sum of squared distances to the nearest centres, searched in fp32."""
    assigner = BlockwiseAssigner("euclidean", False, CPU)
    assigner.set_centers(centers_CE)
    scores = assigner.search(rows_NE, 1)[0]
    return float(rows_NE.square().sum(dtype=torch.float64) - 2 * scores.sum(dtype=torch.float64))


def run_ours(group: Group, folder: Path, num_centers: int, options: dict, out: Path | None = None) -> dict:
    """One clustering; seconds after each iteration, whose centres go to `out`."""
    store = EmbeddingStore(folder, group.rank, group.size)
    is_bf16 = options.get("precision", FAST) == "bf16"
    iterations = options.get("num_iterations", FAISS_ITERATIONS)
    phases = make_phases(store.num_rows, num_centers, iterations, options.get("points", (64,)), options.get("full", 4))
    moving, seed = options.get("moving", 10), options.get("seed", 0)
    rules = Rules("euclidean", phases, options.get("tolerance", TOLERANCE), Repair("euclidean"), seed, moving)

    def make_assigner() -> Assigner:
        return choose_assigner("auto", "euclidean", CPU, is_bf16)

    times: list[float] = []

    def after_iteration(now: Clustering) -> bool:
        times.append(time.perf_counter() - began)
        if out is not None and group.is_main:
            np.save(out / f"{len(times)}.npy", now.centers_CE.numpy())
        return True

    next(store.blocks(65_536))  # rows that fit into memory are there before the clock starts, as faiss's are
    group.barrier()
    began = time.perf_counter()
    init = options.get("init", "auto")
    first_CE = first_centers(init, store, group, num_centers, "euclidean", seed, make_assigner)
    start = Clustering(first_CE, np.zeros(num_centers, np.int64))
    init_seconds = time.perf_counter() - began
    done = kmeans(store, group, make_assigner(), start, rules, after_iteration)
    return {
        "init": init_seconds,
        "times": times,
        "rows": [i.num_rows for i in done.history],
        "centers": done.centers_CE.numpy(),
    }


def run_faiss(rows_NE: torch.Tensor, num_centers: int, **options: int) -> tuple[float, torch.Tensor]:
    """Seconds and centres of faiss.Kmeans with its defaults but for `options`, on all rows."""
    faiss.omp_set_num_threads(NUM_THREADS)
    rows = rows_NE.numpy()
    given = {"niter": FAISS_ITERATIONS, "max_points_per_centroid": len(rows), **options}
    theirs = faiss.Kmeans(rows.shape[1], num_centers, **given)
    spent = seconds(lambda: theirs.train(rows))
    return spent, torch.from_numpy(theirs.centroids.copy())


def run_sklearn(rows_NE: torch.Tensor, num_centers: int, seed: int) -> tuple[float, torch.Tensor]:
    """Seconds and centres of scikit-learn's KMeans with its defaults: one greedy k-means++ start, 300 iterations."""
    theirs = sklearn.cluster.KMeans(num_centers, random_state=seed)
    spent = seconds(lambda: theirs.fit(rows_NE.numpy()))
    return spent, torch.from_numpy(theirs.cluster_centers_)


# What faiss 1.15 can do beyond its defaults. The best is the one of least objective.
FAISS_OPTIONS = {
    "kmeans++": {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS},
    "afkmc2": {"init_method": faiss.ClusteringInitMethod_AFK_MC2},
    "super": {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, "use_super_kmeans": True},
    "kmeans++, 100 iterations, early stop": {
        "init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        "niter": 100,
        "early_stop_threshold": 1e-4,
    },
}


def measure_mixture() -> dict:
    """Time to faiss's final objective."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = write_store(Path(name) / "rows", mixture(MIXTURE_ROWS, MIXTURE_DIM, 4000)), Path(name) / "centers"
        rows_NE = all_rows(folder)
        faiss_seconds, theirs_CE = run_faiss(rows_NE, MIXTURE_CENTERS)
        target = objective(rows_NE, theirs_CE)
        out.mkdir()
        ours = launch(run_ours, folder, MIXTURE_CENTERS, {}, out, num_ranks=NUM_RANKS)
        reached, values = None, []
        for number, spent in reversed(list(enumerate(ours["times"], 1))):
            values.append(objective(rows_NE, torch.from_numpy(np.load(out / f"{number}.npy"))))
            if values[-1] > target:
                break
            reached = spent
    return {
        "time_ratio_vs_faiss": None if reached is None else reached / faiss_seconds,
        "objective_ratio_vs_faiss": values[0] / target,
        "whole_time_ratio_vs_faiss": ours["times"][-1] / faiss_seconds,
        "faiss_seconds": faiss_seconds,
        "seconds": ours["times"][-1],
        "init_seconds": ours["init"],
        "iterations": len(ours["times"]),
        "mixture_precision": FAST,
        "rows_per_iteration": ours["rows"],
    }


def run_picture_seeds(group: Group, folder: Path) -> dict[tuple[int, int], tuple[float, np.ndarray]]:
    """Seconds and centres of ours by k and seed, as `mlcd cluster` runs without options; after one to warm up."""
    torch.set_num_threads(NUM_THREADS // group.size)
    options = {"precision": "fp32", "num_iterations": OUR_ITERATIONS}
    run_ours(group, folder, min(PICTURE_CENTERS), options)
    results = {}
    for num_centers, seed in itertools.product(PICTURE_CENTERS, PICTURE_SEEDS):
        done = run_ours(group, folder, num_centers, {**options, "seed": seed})
        results[num_centers, seed] = done["times"][-1], done["centers"]
    return results


def in_turn(rows_NE: torch.Tensor, folder: Path, num_ranks: int) -> dict[str, dict[tuple[int, int], list]]:
    """Seconds of ours and of faiss by k and seed, and our centres: `ROUNDS` rounds of each in turn. Ours has processes
    of its own, faiss this one, so that neither finds the other's threads or caches."""
    found: dict[str, dict[tuple[int, int], list]] = {
        name: {case: [] for case in itertools.product(PICTURE_CENTERS, PICTURE_SEEDS)}
        for name in ("ours", "faiss", "centers")
    }
    run_faiss(rows_NE, min(PICTURE_CENTERS))
    for _ in range(ROUNDS):
        for case, (spent, centers_CE) in launch(run_picture_seeds, folder, num_ranks=num_ranks).items():
            found["ours"][case].append(spent)
            found["centers"][case] = [centers_CE]
        for num_centers, seed in found["faiss"]:
            found["faiss"][num_centers, seed].append(run_faiss(rows_NE, num_centers, seed=seed + 1)[0])
    return found


def slowdown(found: dict[str, dict[tuple[int, int], list]]) -> float:
    """Ours over faiss: medians over the rounds, summed over the seeds; the worse of the two k."""

    def total(name: str, num_centers: int) -> float:
        return sum(statistics.median(found[name][num_centers, seed]) for seed in PICTURE_SEEDS)

    return max(total("ours", k) / total("faiss", k) for k in PICTURE_CENTERS)


def measure_pictures() -> dict:
    """Final objectives and times on real embeddings."""
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as name:
        index, embeddings = Path(name) / "index", Path(name) / "embeddings"
        for words in (
            ["index", "--shards", str(ROOT / "demo/shards/train/*.tar"), "--out", str(index)],
            ["embed", "--index", str(index), "--encoder", "efficientnet-lite0@128", "--out", str(embeddings)],
        ):
            subprocess.run([sys.executable, "-m", "mlcd_ds", *words], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        rows_NE = all_rows(embeddings)
        ours, on_two_ranks = (in_turn(rows_NE, embeddings, num_ranks) for num_ranks in (1, NUM_RANKS))
    works: dict[str, Callable[[int, int], tuple[float, torch.Tensor]]] = {
        "ours": lambda k, s: (statistics.median(ours["ours"][k, s]), torch.from_numpy(ours["centers"][k, s][0])),
        "sklearn": lambda k, seed: run_sklearn(rows_NE, k, seed),
        "faiss": lambda k, s: (statistics.median(ours["faiss"][k, s]), run_faiss(rows_NE, k, seed=s + 1)[1]),
        **{
            f"faiss, {name}": lambda k, seed, options=options: run_faiss(rows_NE, k, seed=seed + 1, **options)
            for name, options in FAISS_OPTIONS.items()
        },
    }
    table: dict[str, dict[str, dict[str, float]]] = {}
    for num_centers in PICTURE_CENTERS:
        table[str(num_centers)] = {}
        for name, work in works.items():
            done = [work(num_centers, seed) for seed in PICTURE_SEEDS]
            values = [objective(rows_NE, centers_CE) for _, centers_CE in done]
            means = {"objective": statistics.mean(values), "seconds": statistics.mean(spent for spent, _ in done)}
            table[str(num_centers)][name] = means
    return {
        **picture_ratios(table),
        "small_time_ratio_vs_faiss": slowdown(ours),
        "small_time_ratio_vs_faiss_two_ranks": slowdown(on_two_ranks),
        "pictures": table,
    }


def picture_ratios(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Ours over the others', the worse of the two k."""

    def worst(key: str, pick: Callable[[dict[str, dict[str, float]]], dict[str, float]]) -> float:
        return max(row["ours"][key] / pick(row)[key] for row in table.values())

    def best_faiss(row: dict[str, dict[str, float]]) -> dict[str, float]:
        return min((row[f"faiss, {name}"] for name in FAISS_OPTIONS), key=lambda means: means["objective"])

    return {
        "objective_ratio_vs_sklearn": worst("objective", lambda row: row["sklearn"]),
        "small_objective_ratio_vs_faiss": worst("objective", lambda row: row["faiss"]),
        "objective_ratio_vs_faiss_best": worst("objective", best_faiss),
        "time_ratio_vs_faiss_best": worst("seconds", best_faiss),
    }


def measure_assign() -> dict:
    """The search alone, in turn."""
    torch.set_num_threads(NUM_THREADS)
    faiss.omp_set_num_threads(NUM_THREADS)
    generator = torch.Generator().manual_seed(0)
    centers_CE = F.normalize(torch.randn(16_384, 768, generator=generator))
    picks = torch.randint(len(centers_CE), (20_000,), generator=generator)
    rows_NE = F.normalize(centers_CE[picks] + 0.05 * torch.randn(len(picks), 768, generator=generator))
    rows, centers = rows_NE.numpy(), centers_CE.numpy()
    works: dict[str, Callable[[], object]] = {}
    for k in (1, 8):
        works[f"faiss_top{k}"] = lambda k=k: faiss.knn(rows, centers, k, metric=faiss.METRIC_INNER_PRODUCT)
        for precision in ("fp32", "bf16"):
            assigner = choose_assigner("torch", "cosine", CPU, precision == "bf16")
            assigner.set_centers(centers_CE)
            works[f"{precision}_top{k}"] = lambda assigner=assigner, k=k: assigner.search(rows_NE, k)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name].append(seconds(work))

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    results = {"gflops": {n: 2e-9 * len(rows) * len(centers) * 768 / min(t) for n, t in times.items()}}
    exact = {k: works[f"faiss_top{k}"]()[1] for k in (1, 8)}
    for precision in ("fp32", "bf16"):
        end = "" if precision == "fp32" else "_bf16"
        results[f"assign_time_ratio_vs_faiss{end}"] = ratio(f"{precision}_top1", "faiss_top1")
        results[f"assign_top8_time_ratio_vs_faiss{end}"] = ratio(f"{precision}_top8", "faiss_top8")
        results[f"top8_over_top1{end}"] = ratio(f"{precision}_top8", f"{precision}_top1")
        for k in (1, 8):
            found = works[f"{precision}_top{k}"]()[1].numpy()
            shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact[k].tolist(), strict=True)]
            results[f"recall_top{k}{end}"] = float(np.mean(shared)) / k
    return results


def measure_precision() -> dict:
    """What bf16's rounding costs in objective: the same clustering with both."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = write_store(Path(name) / "rows", mixture(100_000, MIXTURE_DIM, 2000))
        rows_NE, finals = all_rows(folder), {}
        for precision in ("fp32", "bf16"):
            out = Path(name) / precision
            out.mkdir()
            options = {"precision": precision, "tolerance": 0.0, "num_iterations": 12}
            ours = launch(run_ours, folder, 1000, options, out, num_ranks=NUM_RANKS)
            finals[precision] = objective(rows_NE, torch.from_numpy(np.load(out / f"{len(ours['times'])}.npy")))
            results[f"seconds_{precision}"] = ours["times"][-1]
    return {"objective_ratio_bf16_over_fp32": finals["bf16"] / finals["fp32"], **results}


def _peak_of_a_rank(group: Group, folder: Path, num_centers: int) -> dict:
    result: dict[str, float] = {}
    options = {"num_iterations": 1, "init": "random", "points": ()}
    run_ours(group, folder, 64, options)  # libraries and connections take theirs once
    with peak_memory(result):
        run_ours(group, folder, num_centers, options)
    return result


def measure_memory() -> dict:
    """Peak of an iteration on a rank beside the formula's."""
    num_rows, dim, num_centers = 200_000, 256, 50_000
    with tempfile.TemporaryDirectory() as name:
        folder = write_store(Path(name) / "rows", mixture(num_rows, dim, 2000))
        measured = launch(_peak_of_a_rank, folder, num_centers, num_ranks=NUM_RANKS)["peak_mib"]
    predicted = sum(cluster_memory(num_rows, num_centers, dim, NUM_RANKS, CPU, is_bf16=False).values()) / MIB
    return {"peak_mib": measured, "predicted_mib": predicted, "rows_fp16_mib": num_rows * dim * 2 / NUM_RANKS / MIB}


def by_gpus() -> dict:
    """The paper's job."""
    table = {}
    for num_ranks in (8, 64, 80):
        parts = cluster_memory(400_000_000, 1_000_000, 768, num_ranks, torch.device("cuda"), is_bf16=True)
        times = predicted_seconds(400_000_000, 1_000_000, 768, num_ranks)
        table[str(num_ranks)] = {**{n: round(v / MIB) for n, v in parts.items()}, **times}
    return table


PARTS: dict[str, Callable[[], dict]] = {
    "mixture": measure_mixture,
    "pictures": measure_pictures,
    "assign": measure_assign,
    "precision": measure_precision,
    "memory": measure_memory,
    "by_gpus": by_gpus,
}


if __name__ == "__main__":
    torch.set_num_threads(NUM_THREADS)
    run_parts(__doc__, PARTS, flat=("mixture", "pictures", "assign"))
