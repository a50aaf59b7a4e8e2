"""The examples of docs/extending.md: each diff applies to the code as it is, and what it adds works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = re.split(r"^## ", (ROOT / "docs/extending.md").read_text(), flags=re.M)[1:]
BLOCK = re.compile(r"^```(diff|python)\n(.*?)^```$", flags=re.M | re.S)


def blocks(section: str) -> dict[str, str]:
    """The diff of a section, and the Python that tries it."""
    return {kind: text for kind, text in BLOCK.findall(section)}


EXAMPLES = {section.split("\n", 1)[0]: blocks(section) for section in SECTIONS if blocks(section)}


def apply(diff: str, tree: Path) -> subprocess.CompletedProcess[str]:
    command = ["git", "apply", "--recount", "-C1", "--whitespace=nowarn", "-"]
    return subprocess.run(command, cwd=tree, input=diff, capture_output=True, text=True, check=False)


def try_out(tree: Path, source: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", source]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_there_is_an_example_of_each() -> None:
    assert list(EXAMPLES) == [
        "An objective",
        "A loss over class centres",
        "An encoder",
        "A data field",
        "An optimizer",
        "A kernel",
    ]
    assert all(set(example) == {"diff", "python"} for example in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mlcd_ds", tmp_path / "mlcd_ds", ignore=shutil.ignore_patterns("__pycache__"))
    without = try_out(tmp_path, EXAMPLES[name]["python"])
    assert without.returncode, "the check passes without the example: it checks nothing"
    done = apply(EXAMPLES[name]["diff"], tmp_path)
    assert done.returncode == 0, done.stderr
    tried = try_out(tmp_path, EXAMPLES[name]["python"])
    assert tried.returncode == 0, tried.stderr
