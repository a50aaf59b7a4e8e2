"""The stages' command lines over one folder, and what a refusal must look like."""

from __future__ import annotations

from pathlib import Path

from shard_maker import Finished, plain_shard, run_stage

STAGES = ("index", "embed", "cluster", "assign")
COUNTS = (5, 6, 7)


def flags_of(stage: str, folder: Path, **changed: object) -> list[str]:
    """A stage's flags; `changed` replaces or adds some."""
    flags: dict[str, dict[str, object]] = {
        "index": {"shards": folder / "shards" / "*.tar"},
        "embed": {"index": folder / "index", "encoder": "pixels@4"},
        "cluster": {"embeddings": folder / "embed", "num_centers": 4, "num_iterations": 3},
        "assign": {"embeddings": folder / "embed", "clusters": folder / "cluster", "num_labels": 2},
    }
    given = {**flags[stage], "out": folder / stage, **changed}
    words = []
    for key, value in given.items():
        words += ["--" + key.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def run(stage: str, folder: Path, **changed: object) -> Finished:
    return run_stage(stage, *flags_of(stage, folder, **changed))


def run_all(folder: Path) -> Path:
    for number, count in enumerate(COUNTS):
        plain_shard(folder / "shards" / f"{number}.tar", count, seed=number)
    for stage in STAGES:
        done = run(stage, folder)
        assert done.status == 0, done.err
    return folder


def message_of(done: Finished) -> str:
    """The one message of a refused run: status 2, no stack trace, one error."""
    assert done.status == 2, (done.status, done.err)
    assert "Traceback" not in done.err and "error" not in done.out, done
    errors = [line for line in done.err.splitlines() if "error: " in line]
    assert len(errors) == 1, done.err
    return errors[0]
