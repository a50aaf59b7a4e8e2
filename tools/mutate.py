"""Does a test notice? Each mutation of tools/mutations.yaml is put into a copy of the tree, and its tests run there.

  python tools/mutate.py [--only TEXT ...] [--table FILE]

A mutation is a text that occurs once in a file, and another one for it. It is killed when a test fails; of a survivor
the list must say why it may live (`equivalent:`), or the tests lack something. The exit status is 1 where one survives
without a reason, or where the tests fail without any mutation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 900


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; `tests` should notice, unless `equivalent` says why nobody can."""

    file: str
    tests: tuple[str, ...]
    old: str
    new: str
    equivalent: str | None = None


def read_mutations() -> list[Mutation]:
    """The list, each text checked to occur once."""
    found = []
    for group in yaml.safe_load((ROOT / "tools/mutations.yaml").read_text()):
        source = (ROOT / group["file"]).read_text()
        for entry in group["mutations"]:
            mutation = Mutation(group["file"], tuple(group["tests"]), **entry)
            if source.count(mutation.old) != 1:
                raise SystemExit(
                    f"{mutation.file}: {mutation.old!r} occurs {source.count(mutation.old)} times, not once"
                )
            found.append(mutation)
    return found


def copy_tree(target: Path) -> None:
    """All files that git knows, as they are now."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def first_failure(tree: Path, tests: tuple[str, ...]) -> str | None:
    """The test that fails first, None where all pass."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" ")[1].rpartition("/")[2] if failed else f"status {done.returncode}"


def main() -> int:
    """Run what was asked for; print a line each, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="those whose file contains one of these")
    parser.add_argument("--table", type=Path, help="write the table there, in Markdown")
    arguments = parser.parse_args()
    mutations = [m for m in read_mutations() if any(text in m.file for text in arguments.only)]
    rows, is_bad = ["| file | mutation | noticed by |", "|---|---|---|"], False
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        copy_tree(tree)
        for tests in sorted({mutation.tests for mutation in mutations}):
            if failure := first_failure(tree, tests):
                raise SystemExit(f"without any mutation {failure} fails")
        for number, mutation in enumerate(mutations, 1):
            path, began = tree / mutation.file, time.perf_counter()
            source = path.read_text()
            path.write_text(source.replace(mutation.old, mutation.new))
            killer = first_failure(tree, mutation.tests)
            path.write_text(source)
            is_bad |= killer is None and mutation.equivalent is None
            result = killer or (f"nobody: {mutation.equivalent}" if mutation.equivalent else "NOBODY")
            old, new = (" ".join(text.split()).replace("|", "\\|") for text in (mutation.old, mutation.new))
            rows.append(f"| {mutation.file.removeprefix('mlcd_ds/')} | `{old}` -> `{new}` | {result} |")
            sys.stdout.write(f"{number}/{len(mutations)} {time.perf_counter() - began:.0f} s {rows[-1]}\n")
            sys.stdout.flush()
            if arguments.table:
                arguments.table.write_text("\n".join(rows) + "\n")
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
