"""`python -m mlcd_ds STAGE` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from distributed_harness import quiet_environment

ROOT = Path(__file__).resolve().parents[2]
CPU_CONFIG = ROOT / "ds_configs/zero1_fp32_cpu.json"
TIMEOUT_S = 240


def mlcd(stage: str, *arguments: object, status: int = 0) -> str:
    """Run `python -m mlcd_ds STAGE`; returns what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "mlcd_ds", stage, *map(str, arguments)],
        env={**quiet_environment(), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stderr
