"""A run's folder: which run owns it, whether that run is finished, and the files kept with it.

config.yaml is the resolved recipe and deepspeed.json the DeepSpeed file, both as of the last start; manifest.json comes
when the last step is done. weights.py reads the checkpoints, checkpoint.py writes them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mlcd_ds.artefacts.files import record_of, write_atomic, write_json
from mlcd_ds.artefacts.manifest import (
    MANIFEST_NAME,
    Manifest,
    library_versions,
    read_manifest,
    refuse_foreign_folder,
    write_manifest,
)
from mlcd_ds.artefacts.readers import check_record, read_json_object
from mlcd_ds.config import Recipe, changed_entries, changed_keys, dump_recipe, free_keys
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.schedule import learning_rate
from mlcd_ds.engine.weights import (
    CHECKPOINT_NAME,
    CONFIG_NAME,
    checkpoint_folders,
    missing_file,
    read_checkpoint,
    read_run_recipe,
)
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.registry import kind_of

DEEPSPEED_NAME = "deepspeed.json"
logger = logging.getLogger("mlcd_ds")  # only rank 0 logs (stages/runner.py)


class TrainManifest(Manifest):
    """Manifest of `mlcd train`; written when the last step is done."""

    step: int


def claim_folder(recipe: Recipe, ds_file: dict[str, Any], inputs: dict[str, str], group: Group) -> bool:
    """Claim the folder for this run, and write recipe and DeepSpeed file into it. Returns whether the run is finished.

    Collective. UserError when the folder holds another run.
    """
    out = recipe.train.out
    refuse_foreign_folder(out, "train", "train.out")
    if (out / CONFIG_NAME).exists():
        if checkpoint_folders(out):  # before the first one nothing depends on the recipe that was there
            _check_same_run(read_run_recipe(out), recipe)
        _tell_changes(out / DEEPSPEED_NAME, ds_file)
    finished_at = _finished_at(out, inputs)
    group.barrier()  # all ranks have read the files that are written below
    if finished_at == recipe.train.steps:
        return True
    if group.is_main:
        (out / MANIFEST_NAME).unlink(missing_ok=True)
        write_atomic(out / CONFIG_NAME, lambda file: file.write(dump_recipe(recipe).encode()))
        write_json(out / DEEPSPEED_NAME, ds_file)
    if finished_at is not None:
        logger.info("train: %d steps were done; going on to %d", finished_at, recipe.train.steps)
    return False


def write_train_manifest(recipe: Recipe, inputs: dict[str, str]) -> None:
    """The last step of a run: mark it finished, with its final checkpoint."""
    last = checkpoint_folders(recipe.train.out)[-1] / CHECKPOINT_NAME
    manifest = TrainManifest(
        stage="train",
        parameters=recipe.model_dump(mode="json"),
        inputs=inputs,
        files={str(last.relative_to(recipe.train.out)): record_of(last)},
        versions=library_versions(),
        step=recipe.train.steps,
    )
    write_manifest(recipe.train.out, manifest)


def _finished_at(out: Path, inputs: dict[str, str]) -> int | None:
    """The last step of a finished run, None where it is not finished.

    UserError when it had other inputs, or when its last checkpoint is gone: checkpoint.json is compared by checksum,
    the files that it lists by size.
    """
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out, TrainManifest, "train")
    for role, fingerprint in manifest.inputs.items():
        if inputs.get(role) != fingerprint:
            raise UserError(f"{out} was trained on other {role} than data.{role} names now: choose another train.out.")
    fix = f"Put it back, or remove {out / MANIFEST_NAME} to train again from the newest checkpoint."
    for name, record in manifest.files.items():
        check_record(out / name, record, fix)
        folder = (out / name).parent
        if missing := missing_file(folder, read_checkpoint(folder)):
            raise UserError(f"{missing} is missing or was cut, though the run is finished. {fix}")
    return manifest.step


def _check_same_run(before: Recipe, recipe: Recipe) -> None:
    """Raise UserError naming the keys that may not change, and what to do instead."""
    path, free = recipe.train.out / CONFIG_NAME, free_keys()
    changed = changed_keys(before, recipe)
    if other := [key for key in changed if key not in free]:
        raise UserError(f"{path} is of a run with another {', '.join(other)}: choose another train.out.")
    if bent := [key for key in changed if free[key] == "rates"]:
        _check_rates(before, recipe, " and ".join(bent))


def _check_rates(before: Recipe, recipe: Recipe, keys: str) -> None:
    """Raise UserError where the steps already done would have had other learning rates, or been of other kinds."""
    out, steps = recipe.train.out, recipe.train.steps
    folders = checkpoint_folders(out)
    done = read_checkpoint(folders[-1]).step if folders else 0
    path = out / CONFIG_NAME
    if steps < done:
        raise UserError(f"{path} is of a run with {done} steps done: train.steps cannot be {steps}.")
    rates = (
        (learning_rate(step, before.train.steps, before.optimizer), learning_rate(step, steps, recipe.optimizer))
        for step in range(done)
    )
    first = next((step for step, (was, now) in enumerate(rates) if was != now), None)
    if first is None:
        kind = kind_of(recipe.objective)
        first = next((s for s in range(done) if kind.step_kind(before, s) != kind.step_kind(recipe, s)), None)
        if first is None:
            return
        reason = f"by it the objective {recipe.objective.name} would have done something else in step {first}"
        fix = "Keep it"
    elif recipe.optimizer.schedule == "constant":
        reason = f"the cool-down began after step {first}"
        fix = f"Remove the checkpoints after that step in {folders[-1].parent}, where an earlier one is kept"
    else:
        reason = f"optimizer.schedule {recipe.optimizer.schedule} spreads the fall of the rate over all of train.steps"
        fix = "Keep it"
    raise UserError(
        f"{path}: {keys} cannot change after {done} steps: {reason}. {fix}, or start a new run from this one: "
        f"--init-from {out} train.out=ANOTHER."
    )


def _tell_changes(path: Path, ds_file: dict[str, Any]) -> None:
    """Log in one line how the DeepSpeed file has changed; the run goes on with the new one."""
    if not path.exists():  # an earlier version kept none
        return
    before = read_json_object(path, "Remove it: it is written again.")
    if changed := changed_entries(before, ds_file):
        logger.info("train: the DeepSpeed file differs from %s: %s", path, ", ".join(changed))
