"""What several folders of tests share: one thread a process, and a tiny data set made by the real stages."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

SHARD = Path(__file__).resolve().parents[1] / "demo/shards/test/00000.tar"
NUM_IMAGES, NUM_CENTERS, NUM_LABELS = 100, 25, 4  # 25 divides by neither 2 nor 3
STAGE_TIMEOUT_S = 120


@dataclass(frozen=True)
class TinyData:
    """Folders of the stages before training, over `NUM_IMAGES` images in one shard."""

    shard: Path
    index: Path
    embeddings: Path
    clusters: Path
    labels: Path


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def quiet_environment() -> dict[str, str]:
    """For child processes: one thread each, no launcher's variables, plain CPU."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launchers}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def cut_tar(source: Path, target: Path, num_samples: int) -> None:
    """The first samples of a shard, as another shard."""
    keys: set[str] = set()
    with tarfile.open(source) as whole, tarfile.open(target, "w") as part:
        for member in whole:
            keys.add(member.name.split(".")[0])
            if len(keys) > num_samples:
                break
            part.addfile(member, whole.extractfile(member))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Index, embed (the pixels themselves), cluster and assign, through their command lines."""
    folder = tmp_path_factory.mktemp("tiny-data")
    data = TinyData(folder / "00000.tar", *(folder / name for name in ("index", "embeddings", "clusters", "labels")))
    cut_tar(SHARD, data.shard, NUM_IMAGES)
    commands = {
        "index": ["--shards", data.shard, "--out", data.index],
        "embed": ["--index", data.index, "--encoder", "pixels@8", "--out", data.embeddings],
        "cluster": ["--embeddings", data.embeddings, "--num-centers", NUM_CENTERS, "--num-iterations", 5]
        + ["--out", data.clusters],
        "assign": ["--embeddings", data.embeddings, "--clusters", data.clusters, "--num-labels", NUM_LABELS]
        + ["--out", data.labels],
    }
    for stage, arguments in commands.items():
        command = [sys.executable, "-m", f"mlcd_ds.{stage}", *map(str, arguments)]
        done = subprocess.run(
            command, env=quiet_environment(), capture_output=True, text=True, timeout=STAGE_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{stage}: {done.stderr}"
    return data
