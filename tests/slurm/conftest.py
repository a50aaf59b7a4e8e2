"""The `slurm` fixture: one real cluster for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import SlurmCluster, missing_requirement


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Two virtual nodes. Skips where Slurm is absent, or fails if MLCD_REQUIRE_SLURM=1."""
    problem = missing_requirement()
    if problem:
        if os.environ.get("MLCD_REQUIRE_SLURM") == "1":
            pytest.fail(f"MLCD_REQUIRE_SLURM=1, but {problem}")
        pytest.skip(problem)
    with SlurmCluster() as cluster:
        yield cluster
