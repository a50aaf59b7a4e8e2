"""A kill between any two writes of a checkpoint leaves one that resumes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_harness import quiet_environment

SCRIPT = Path(__file__).with_name("kill_points.py")


@pytest.mark.pipeline
def test_every_moment_of_a_save(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "run")],
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert [int(number) for number, _, _ in lines] == list(range(len(lines)))
    steps = [int(step) for _, step, _ in lines]
    assert steps[:2] == [0, 1] and {event for _, _, event in lines[1:-1]} >= {"open", "os.rename", "os.mkdir"}
    # Each child finds the checkpoint of before the kill, or the new one where the kill came after its rename.
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(steps[1:]))
    assert len(lines) > 15 and steps[-1] < len(lines) / 2
    names = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert names == [f"step_{steps[-1] + 1:08d}"], "nothing is left behind"
