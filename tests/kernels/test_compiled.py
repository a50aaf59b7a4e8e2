"""The Triton kernels as GPUs run them, compiled without one: no spills, within shared memory, on tensor cores.

A condition, not a measurement: it says nothing about speed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
pytestmark = pytest.mark.skipif(
    not all((BIN / name).exists() for name in ("ptxas", "cuobjdump")), reason="triton came without ptxas"
)

SHARED_KIB = {80: 163, 90: 227, 100: 227}  # of a block
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
KERNELS = ("exp_block", "tile_maxima")
CASES = [(kernel, precision, sm) for kernel in KERNELS for precision in ("bf16", "fp32") for sm in (80, 90)]
CASES.append(("tile_maxima", "bf16", 100))
SPILLING = ("tile_maxima", "fp32", 80, (128, 128, 64))  # the tiles of bf16
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, ...], dict]:
    """Of each case: what ptxas says, bytes of shared memory, PTX. `SPILLING` is one more."""
    cases = [(*case, None) for case in CASES]
    cases.append(SPILLING)
    folder = tmp_path_factory.mktemp("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(BIN), json.dumps(cases)],
        env=env | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def spilled(result: dict) -> int:
    """Bytes of a thread's stack, which is in memory."""
    return int(re.findall(r"STACK:(\d+)", result["usage"])[-1])


@pytest.mark.parametrize(("kernel", "precision", "sm"), CASES)
def test_a_kernel_fits_the_gpu(compiled: dict, kernel: str, precision: str, sm: int) -> None:
    result = compiled[kernel, precision, sm, None]
    assert spilled(result) == 0
    assert 0 < result["shared"] <= SHARED_KIB[sm] * 1024
    registers = int(re.findall(r"REG:(\d+)", result["usage"])[-1])
    assert registers * 256 <= 65536, "a multiprocessor's registers hold a block"
    assert "cp.async" in result["ptx"], "loads are meant to run ahead"
    assert (TENSOR_CORES[sm] in result["ptx"]) == (precision == "bf16")


def test_larger_tiles_of_fp32_spill(compiled: dict) -> None:
    """The known-bad twin."""
    assert spilled(compiled[SPILLING]) > 1000
