"""Finding and reading the towers of a run: what evaluation and export need, without DeepSpeed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from mlcd_ds.artefacts.files import FileRecord, seal_of, write_json
from mlcd_ds.artefacts.readers import check_size, decoding, read_json_object, read_tensors, read_yaml
from mlcd_ds.artefacts.typed import Frozen, first_problem
from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.engine.released import fill_image, fill_text, load_released
from mlcd_ds.errors import UserError
from mlcd_ds.models.text import TextTower
from mlcd_ds.models.tower import Tower
from mlcd_ds.models.vit import ViT
from mlcd_ds.objectives.pair_objective import first_scale
from mlcd_ds.objectives.registry import kind_of

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"
CHECKPOINT_NAME = "checkpoint.json"
BACKBONE_NAME, AVERAGE_NAME = "backbone.safetensors", "ema.safetensors"
WEIGHT_FILES = {"image": BACKBONE_NAME, "text": "text.safetensors", "objective": "objective.safetensors"}
AVERAGE_FILES = {"image": AVERAGE_NAME, "text": "ema-text.safetensors", "objective": "ema-objective.safetensors"}
Weights = Literal["last", "ema"]


def _text_tower(recipe: Recipe) -> TextTower:
    assert recipe.text, "the recipe was checked"
    return TextTower(recipe.text)


TOWERS: dict[str, Callable[[Recipe], Tower]] = {"image": lambda recipe: ViT(recipe.model), "text": _text_tower}
"""Each without weights: they hold NaN until `init_weights`."""


class FrozenTower(Frozen):
    """A tower that is not in a run's checkpoints, as the run does not train it."""

    source: str  # folder of the checkpoint or of the Hugging Face model that it came from
    sha256: str  # of its weights as they are used (`tower_checksum`)


class CheckpointManifest(Frozen):
    """Written last into a checkpoint's folder: its presence marks the checkpoint complete."""

    step: int
    num_ranks: int
    zero_stage: int
    tensor_parallel: int = 1
    objective: dict[str, int] = Field(default_factory=dict)  # what the objective notes of its files
    num_updates: int | None = None  # none in those of earlier versions, which hold no whole moments
    loss_scale: dict[str, float] = Field(default_factory=dict)
    inputs: dict[str, str]
    recipe: dict
    deepspeed: dict | None = None  # as the engine was given it
    files: dict[str, FileRecord]
    frozen: dict[str, FrozenTower] = Field(default_factory=dict)
    versions: dict[str, str]
    git_commit: str | None
    seal: str | None = None  # none in those of earlier versions

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, content: Any) -> Any:
        """They knew one kind of objective, and had its number beside the others."""
        if isinstance(content, dict) and "num_classes" in content:
            others = {key: value for key, value in content.items() if key != "num_classes"}
            return {"objective": {"num_classes": content["num_classes"]}, **others}
        return content


def write_checkpoint_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write checkpoint.json with the checksum of its own content."""
    content = manifest.model_dump(mode="json")
    write_json(folder / CHECKPOINT_NAME, {**content, "seal": seal_of(content)})


def older_checkpoint(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"Remove {folder} to go on from an older checkpoint."


def read_checkpoint(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder."""
    path, fix = folder / CHECKPOINT_NAME, older_checkpoint(folder)
    content = read_json_object(path, fix)
    try:
        manifest = CheckpointManifest.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}. {fix}") from None
    if manifest.seal not in (None, seal_of(content)) or folder.name != f"step_{manifest.step:08d}":
        raise UserError(f"{path} was changed after it was written. {fix}")
    return manifest


def missing_file(folder: Path, manifest: CheckpointManifest) -> Path | None:
    """A file of a checkpoint that is missing or has another size; None when all are there."""
    for name, record in manifest.files.items():
        try:
            check_size(folder / name, record, "")
        except UserError:
            return folder / name
    return None


def checkpoint_folders(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run / CHECKPOINTS).glob(f"step_*/{CHECKPOINT_NAME}"))


def read_run_recipe(run: Path) -> Recipe:
    """The resolved recipe in a run's folder."""
    path = run / CONFIG_NAME
    if not path.exists():
        raise UserError(f"{path} is not there: {run} is not the folder of a training run.")
    fix = "Put it back from a copy, or remove it: the same training command writes it again."
    return parse_recipe(read_yaml(path, fix), str(path))


def newest_checkpoint(run: Path) -> Path:
    """Folder of a run's newest whole checkpoint."""
    folders = checkpoint_folders(run)
    if not folders:
        raise UserError(f"{run} has no whole checkpoint yet: train at least train.checkpoint_every steps.")
    return folders[-1]


def weights_record(checkpoint: Path, weights: Weights, of: str = "image") -> tuple[Path, FileRecord]:
    """The file of the weights of a tower or the objective, or of their moving average, and its record.

    UserError where there is none.
    """
    path = checkpoint / (AVERAGE_FILES if weights == "ema" else WEIGHT_FILES)[of]
    record = read_checkpoint(checkpoint).files.get(path.name)
    if record is None and weights == "ema":
        raise UserError(f"{checkpoint} holds no {path.name}: the run has train.ema_decay null. Take --weights last.")
    if record is None:
        raise UserError(f"{checkpoint / CHECKPOINT_NAME} lists no {path.name}. {older_checkpoint(checkpoint)}")
    return path, record


def weights_checksum(checkpoint: Path, weights: Weights, of: str = "image") -> str:
    """SHA-256 of a tower's file, or the objective's; or of its weights, where the run has the tower from elsewhere."""
    frozen = read_checkpoint(checkpoint).frozen.get(of)
    return frozen.sha256 if frozen else weights_record(checkpoint, weights, of)[1].sha256


def checkpoint_recipe(checkpoint: Path) -> Recipe:
    """The recipe by which a checkpoint was trained."""
    return parse_recipe(read_checkpoint(checkpoint).recipe, str(checkpoint / CHECKPOINT_NAME))


def load_backbone(checkpoint: Path, weights: Weights = "last") -> ViT:
    """The backbone of a checkpoint folder, in fp32 on the CPU; "ema": the moving average of its weights."""
    tower = _load_tower("image", checkpoint, weights)
    assert isinstance(tower, ViT)
    return tower


def load_text_tower(checkpoint: Path, weights: Weights = "last") -> TextTower:
    """The same of its text tower. UserError where the run has none."""
    tower = _load_tower("text", checkpoint, weights)
    assert isinstance(tower, TextTower)
    return tower


def _load_tower(name: str, checkpoint: Path, weights: Weights) -> Tower:
    manifest, recipe, fix = read_checkpoint(checkpoint), checkpoint_recipe(checkpoint), older_checkpoint(checkpoint)
    if name not in kind_of(recipe.objective).towers_of(recipe):
        raise UserError(
            f"{checkpoint} has no {name} tower: its objective is {recipe.objective.name}. Name a run over images and "
            "texts (objective.name=clip or siglip)."
        )
    if frozen := manifest.frozen.get(name):  # its average is itself
        tower = TOWERS[name](recipe)
        fill_from(frozen_folder(name, frozen), tower)
        check_frozen(name, frozen, tower)
        return tower.eval()
    path, record = weights_record(checkpoint, weights, name)
    with torch.device("meta"):
        tower = TOWERS[name](recipe)
    tensors = read_tensors(path, fix, record)
    with decoding(path, fix):
        tower.load_state_dict(tensors, assign=True)
    return tower.eval()


def load_scale(checkpoint: Path, weights: Weights = "last") -> tuple[Tensor, Tensor | None]:
    """Of a run over pairs: the logarithm of the factor on cosines, and SigLIP's summand (CLIP has none); numbers.

    The first one, where an objective has several. UserError where it has none.
    """
    recipe, fix = checkpoint_recipe(checkpoint), older_checkpoint(checkpoint)
    module = kind_of(recipe.objective).engine_module(recipe)
    scale = first_scale(module) if module else None
    if module is None or scale is None:
        raise UserError(
            f"{checkpoint} has no factor on cosines: its objective is {recipe.objective.name}, which learns none. "
            "Take its image tower alone (--towers image)."
        )
    path, record = weights_record(checkpoint, weights, "objective")
    tensors = read_tensors(path, fix, record)
    with decoding(path, fix):
        module.load_state_dict(tensors)
    return scale.log_factor, None if scale.bias is None else scale.bias.detach()[0].float()


def fill_from(folder: Path, tower: Tower) -> list[str]:
    """Fill a tower from a checkpoint folder of ours or a Hugging Face folder; returns what was done besides copying,
    in words. UserError names what does not fit."""
    if not (folder / CHECKPOINT_NAME).exists():
        return load_released(folder, tower)
    if isinstance(tower, ViT):
        image = load_backbone(folder)
        return fill_image(tower, image.config, dict(image.state_dict()), folder)
    assert isinstance(tower, TextTower)
    text = load_text_tower(folder)
    return fill_text(tower, text.config, dict(text.state_dict()), folder)


def tower_checksum(tower: nn.Module) -> str:
    """SHA-256 of a tower's weights: names, shapes and fp32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def frozen_folder(name: str, record: FrozenTower) -> Path:
    """Where a frozen tower came from. UserError where that is gone."""
    folder = Path(record.source)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is gone, which the frozen {name} tower came from: put it back. (A run keeps its newest "
            "train.keep_checkpoints, and those of train.milestone_every.)"
        )
    return folder


def check_frozen(name: str, expected: FrozenTower, tower: nn.Module) -> None:
    """UserError where a frozen tower is not the one that a run was trained with."""
    if tower_checksum(tower) != expected.sha256:
        raise UserError(
            f"the frozen {name} tower in {expected.source} is not the one that the run was trained with (their "
            "checksums differ): put that one back."
        )
