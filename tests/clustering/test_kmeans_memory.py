"""What a clustering needs, predicted: the table in docs/clustering.md, and what a dry run prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from embeddings_maker import blobs, write_embeddings

from mlcd_ds.clustering.kmeans import Phase
from mlcd_ds.clustering.kmeans_memory import cluster_memory, predicted_seconds
from mlcd_ds.stages.cluster import main as cluster

PAPER = (400_000_000, 1_000_000, 768)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "clustering.md"


def line_of(start: str) -> list[float]:
    """The figures of a line of the table in the docs."""
    (line,) = (line for line in DOCS.read_text().splitlines() if line.startswith(f"| {start}"))
    return [float(cell.replace(",", "")) for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize(("column", "num_ranks"), [(0, 8), (1, 64), (2, 80)])
def test_the_table_in_the_docs_is_that_of_the_formulas(column: int, num_ranks: int) -> None:
    parts = cluster_memory(*PAPER, num_ranks, torch.device("cuda"), is_bf16=True)
    mib = {name: value / 2**20 for name, value in parts.items()}
    lines = {
        "centres, fp32": mib["centres"],
        "centres, bf16": mib["centres in bf16"],
        "sums, then new centres": mib["sums, then new centres"],
        "own range": mib["own range"],
        "counts and spreads": mib["counts and spreads"],
        "block of rows": mib["stored block"] + mib["block"],
        "scores": mib["scores"],
        "in all": sum(mib.values()),
    }
    for name, value in lines.items():
        assert line_of(name)[column] == pytest.approx(value, abs=0.6), name
    times = predicted_seconds(*PAPER, num_ranks)
    assert line_of("*predicted:* products")[column] == pytest.approx(times["iteration_s"], abs=0.6)
    assert line_of("reading")[column] == pytest.approx(times["reading_s"], abs=0.6)
    assert line_of("all iterations")[column] == pytest.approx(times["all_h"], abs=0.006)


def test_rows_are_not_held_and_ranks_share_the_time() -> None:
    few, many = (cluster_memory(n, 1000, 64, 4, torch.device("cpu"), is_bf16=False) for n in (10**6, 10**9))
    assert few == many, "memory does not grow with the number of rows"
    one, two = (predicted_seconds(10**8, 10**5, 256, ranks, (Phase(0.5, 4), Phase(1.0, 2))) for ranks in (1, 2))
    assert one["iteration_s"] == pytest.approx(2 * two["iteration_s"], rel=0.01) and one["collectives_s"] == 0
    assert one["all_h"] * 3600 == pytest.approx(4 * (one["iteration_s"] + one["reading_s"]), rel=0.1)


def test_a_dry_run_prints_what_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(tmp_path / "embeddings", blobs((50, 20), dim=16, num_blobs=6))
    arguments = ["--embeddings", tmp_path / "embeddings", "--num-centers", 10, "--out", tmp_path / "out", "--dry-run"]
    assert cluster([str(argument) for argument in arguments]) == 0
    text = capsys.readouterr().err
    assert re.search(r"1 here \(cpu\) +8 GPUs +64 GPUs +80 GPUs", text)
    assert all(name in text for name in ("in all", "h: all iterations", "Assumed: 200 TFLOP/s"))
    assert not (tmp_path / "out").exists()
