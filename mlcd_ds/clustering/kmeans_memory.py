"""What a clustering takes on a rank, from its shapes alone: memory, and time under assumed speeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlcd_ds.clustering.blockwise import BLOCKS, CHUNK
from mlcd_ds.clustering.kmeans import BLOCK_ROWS, Phase, make_phases

FP16, FP32, INT64 = 2, 4, 8
# Assumed, not measured: operations a second of a rank's products, bytes a second between ranks and from the disk.
ASSUMED_FLOPS = {"cuda": 200e12, "cpu": 0.3e12}
ASSUMED_LINK, ASSUMED_READ = 20e9, 2e9
TARGETS = (8, 64, 80)


def cluster_memory(
    num_rows: int, num_centers: int, dim: int, num_ranks: int, device: torch.device, *, is_bf16: bool
) -> dict[str, int]:
    """Bytes at the peak of an iteration on one of `num_ranks` ranks. Embeddings stay on disk, memory-mapped.

    The new centres replace the sums: they never exist together. On a GPU, `stored block` is in host memory.
    """
    block = BLOCKS[device.type, is_bf16]
    rows = min(BLOCK_ROWS, -(-num_rows // num_ranks))
    per_rank = -(-num_centers // num_ranks)
    centers = min(block.centers, -(-num_centers // CHUNK) * CHUNK)
    has_copy = is_bf16 and device.type == "cuda"
    return {
        "centres": num_centers * dim * FP32,
        "centres in bf16": num_centers * dim * FP16 if has_copy else 0,
        "sums, then new centres": per_rank * num_ranks * dim * FP32,
        "own range": per_rank * dim * FP32,
        "counts and spreads": 3 * num_centers * INT64,
        "stored block": rows * dim * FP16,
        "block": rows * dim * FP32 * 2,
        "scores": min(block.rows, rows) * centers * FP32 * (CHUNK + 1) // CHUNK,
    }


def predicted_seconds(
    num_rows: int,
    num_centers: int,
    dim: int,
    num_ranks: int,
    phases: Sequence[Phase] | None = None,
    device_type: str = "cuda",
) -> dict[str, float]:
    """Seconds of one iteration over all rows, of its collectives and its reading, and of all phases."""
    phases = make_phases(num_rows, num_centers, 20, (64,), 4) if phases is None else phases
    products = 2 * num_rows * num_centers * dim / num_ranks / ASSUMED_FLOPS[device_type]
    collectives = 2 * num_centers * dim * FP32 * (num_ranks - 1) / num_ranks / ASSUMED_LINK
    reading = num_rows * dim * FP16 / num_ranks / ASSUMED_READ
    passes = sum(phase.rate * phase.num_iterations for phase in phases)
    count = sum(phase.num_iterations for phase in phases)
    return {
        "iteration_s": round(products, 1),
        "collectives_s": round(collectives, 2),
        "reading_s": round(reading, 1),
        "all_h": round((passes * (products + reading) + count * collectives) / 3600, 2),
    }


def memory_table(
    num_rows: int, num_centers: int, dim: int, num_ranks: int, phases: Sequence[Phase], device_type: str, is_bf16: bool
) -> str:
    """MiB a rank and predicted time, for this number of ranks and for some of GPUs, as text."""
    kinds = [(num_ranks, device_type, is_bf16), *((ranks, "cuda", True) for ranks in TARGETS)]
    columns = [
        cluster_memory(num_rows, num_centers, dim, ranks, torch.device(kind), is_bf16=bf16)
        for ranks, kind, bf16 in kinds
    ]
    times = [predicted_seconds(num_rows, num_centers, dim, ranks, phases, kind) for ranks, kind, _ in kinds]
    heads = [f"{num_ranks} here ({device_type})", *(f"{ranks} GPUs" for ranks in TARGETS)]
    lines = ["MiB a rank".ljust(24) + "".join(head.rjust(16) for head in heads)]
    for name in columns[0]:
        lines.append(name.ljust(24) + "".join(f"{column[name] / 2**20:16,.0f}" for column in columns))
    lines.append("in all".ljust(24) + "".join(f"{sum(column.values()) / 2**20:16,.0f}" for column in columns))
    names = {
        "iteration_s": "s: products of a pass",
        "collectives_s": "s: collectives",
        "reading_s": "s: reading a pass",
        "all_h": "h: all iterations",
    }
    for key, name in names.items():
        lines.append(name.ljust(24) + "".join(f"{time[key]:16,.2f}" for time in times))
    speeds = f"{ASSUMED_FLOPS['cuda'] / 1e12:.0f} TFLOP/s a GPU, {ASSUMED_FLOPS['cpu'] / 1e12} a CPU rank"
    lines.append(f"Assumed: {speeds}, {ASSUMED_LINK / 1e9:.0f} GB/s between ranks, {ASSUMED_READ / 1e9:.0f} from disk.")
    return "\n".join(lines)
