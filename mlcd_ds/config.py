"""Recipes: named training runs in YAML, read into one typed model. `mlcd_ds/recipes/*.yaml` holds the ones we ship.

A recipe says what is learned; `ds_configs/*.json` says how DeepSpeed does it. Each component's settings are defined
beside the component. `base: NAME`, or a path relative to the file's folder, inherits all of another recipe except its
description; the file then holds only what differs.
"""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from mlcd_ds.artefacts.readers import parse_yaml, read_yaml
from mlcd_ds.artefacts.typed import MAX_THREADS, FilePath, Freedom, Frozen, first_problem, free_field, shown
from mlcd_ds.data.loader import AugmentConfig
from mlcd_ds.errors import UserError
from mlcd_ds.heads.partial_fc import HeadConfig
from mlcd_ds.models.vit import ViTConfig
from mlcd_ds.objectives.class_losses import ObjectiveConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
RECIPES = Path(__file__).resolve().parent / "recipes"


class DataConfig(Frozen):
    """Where images and labels come from, and in which order."""

    index: FilePath | None = free_field(None, description="folder of `mlcd index`")
    labels: FilePath | None = free_field(None, description="folder of `mlcd assign`")
    clusters: FilePath | None = free_field(None, description="folder of `mlcd cluster`; head.init=centers reads it")
    augment: AugmentConfig = AugmentConfig()
    knn_index: FilePath | None = free_field(
        None, description="folder of `mlcd index` with labelled images, for train.knn_every"
    )
    knn_label_key: str = free_field("label", description="key of the whole number in their .json; null is no label")
    num_streams: int = Field(4, ge=1, description="equal parts of the global batch; ranks must divide it")
    shuffle_window: int = Field(
        8192, ge=1, le=10**8, description="samples of a stream that are shuffled among each other"
    )
    num_threads: int = free_field(2, ge=1, le=MAX_THREADS, description="decoding threads of a rank")


class OptimizerConfig(Frozen):
    """AdamW for the backbone; its numbers and its schedule also for the head."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest; not clipped"
    )
    muon_lr_scale: float = Field(20.0, gt=0, description="factor on lr for Muon's matrices")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(0.2, ge=0, description="on matrices only (paper: 0.2)")
    betas: tuple[Decay, Decay] = Field((0.9, 0.98), description="AdamW's decay rates (not published)")
    eps: float = Field(1e-6, gt=0, description="AdamW's epsilon (not published)")
    warmup_steps: int = Field(2000, ge=0, description="linear warm-up (paper: 2,000)")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up (not published)")
    cooldown_steps: int = free_field(
        0, when="rates", ge=0, description="of schedule constant: the last steps, in which lr falls linearly"
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="part of lr at the end (not published)")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on lr from a block to the one before it, for fine-tuning; 1: none"
    )
    clip_norm: float = Field(5.0, gt=0, description="largest gradient norm of the backbone (team code: 5)")
    head_clip_norm: float = Field(5.0, gt=0, description="largest gradient norm of the head, all shards (team code: 5)")
    head_lr_scale: float = Field(1.0, gt=0, description="factor on lr for the head")


class PhaseConfig(Frozen):
    """A first part of a run with other images. A null value inherits the run's."""

    until: int = Field(ge=1, description="the phase ends after this many steps of the run")
    image_size: int | None = Field(
        None, ge=1, le=4096, description="pixels; model.image_size comes after the last phase"
    )
    token_drop: float | None = Field(None, ge=0, lt=1, description="part of the patches left out")


class TrainConfig(Frozen):
    """Length, batch, precision and book-keeping of a run."""

    out: FilePath = free_field(Path("runs/train"), description="folder of the run")
    init_from: FilePath | None = Field(
        None,
        description="what the run starts from: another run, or a checkpoint of one, backbone and head; or a Hugging "
        "Face folder (CLIP, MLCD, or `mlcd export`'s), the backbone alone",
    )
    steps: int = free_field(when="rates", ge=1, le=10**9, description="optimizer steps")
    global_batch: int = Field(ge=1, le=2**20, description="images a step, over all ranks")
    micro_batch_per_rank: int | None = free_field(None, ge=1, description="images a forward pass; null: all of a rank")
    drop_path: float = Field(0.0, ge=0, lt=1, description="chance that an image skips a branch of the last block")
    token_drop: float = Field(0.0, ge=0, lt=1, description="part of an image's patches left out, drawn each time")
    phases: tuple[PhaseConfig, ...] = Field((), description="what comes before the settings above: low resolution, say")
    recompute: Literal["none", "mlp", "block"] = free_field(
        "none", description="activation checkpointing: of each block's MLP branch, or of each whole block"
    )
    compile: bool = free_field(
        False, description="torch.compile each block (needs a C++ compiler; slow at the first steps)"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "bf16", description="of the backbone; auto: as the DeepSpeed file says"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of weights, order, crops and sampled classes")
    checkpoint_every: int = free_field(1000, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = free_field(2, ge=1, description="newest checkpoints that stay on disk")
    milestone_every: int | None = free_field(None, ge=1, description="steps between checkpoints that stay for good")
    ema_decay: float | None = free_field(
        None, gt=0, lt=1, description="of a moving average of the backbone's weights, kept beside them; null: none"
    )
    knn_every: int | None = free_field(None, ge=1, description="steps between kNN accuracies on data.knn_index")
    profile_steps: tuple[int, int] | None = free_field(
        None, description="first and last step, counted from 1, of a trace by torch.profiler in the run's folder"
    )
    log_every: int = free_field(10, ge=1, description="steps between log entries; the host waits for the device then")


class Recipe(Frozen):
    """A whole run."""

    description: str = free_field(min_length=1, description="what the run is, and what is to be expected of it")
    model: ViTConfig
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.train.global_batch % self.data.num_streams:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} is not a multiple of data.num_streams "
                f"{self.data.num_streams}: change one of them"
            )
        if self.head.init == "centers" and self.data.labels and not self.data.clusters:
            raise ValueError("head.init is centers, but data.clusters is not given: add data.clusters=FOLDER")
        if self.head.sampling == "partial_fc" and self.train.micro_batch_per_rank:
            raise ValueError(
                "head.sampling partial_fc draws around the labels of a whole batch, which micro-batches cut: set "
                "train.micro_batch_per_rank=null or head.sampling=uniform"
            )
        if self.train.knn_every and not self.data.knn_index:
            raise ValueError("train.knn_every is given, but data.knn_index is not: add data.knn_index=FOLDER")
        if (steps := self.train.profile_steps) and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"train.profile_steps {list(steps)} must be a first and a last step, counted from 1")
        ends = [0, *(phase.until for phase in self.train.phases), self.train.steps]
        if ends != sorted(set(ends)):
            raise ValueError(
                f"train.phases end after {ends[1:-1]} steps: these must rise, and stay below train.steps {ends[-1]}"
            )
        for phase in self.train.phases:
            if phase.image_size and phase.image_size % self.model.patch_size:
                raise ValueError(
                    f"train.phases has image_size {phase.image_size}, no multiple of model.patch_size "
                    f"{self.model.patch_size}: take one"
                )
        if self.optimizer.cooldown_steps and self.optimizer.schedule == "cosine":
            raise ValueError("optimizer.cooldown_steps is for optimizer.schedule=constant: set that, or leave it out")
        if self.optimizer.warmup_steps + self.optimizer.cooldown_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} and cooldown_steps "
                f"{self.optimizer.cooldown_steps} are more than train.steps {self.train.steps}: lower one of them"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below train.steps {self.train.steps}: "
                f"lower it (optimizer.warmup_steps={self.train.steps // 10})"
            )
        return self


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe by name or YAML file, with `key=value` overrides. Raises UserError naming file, key and fix."""
    path = _find_recipe(name, Path(), f"--recipe {name!r}")
    content = _read_with_bases(path, ())
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(content, str(path))


def _find_recipe(name: str, folder: Path, source: str) -> Path:
    """File of a recipe: a path relative to `folder`, or the name of one that we ship."""
    path = folder / name if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"{source}: no such file, and not one of {', '.join(recipe_names())}.")
    return path


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of a recipe's file, put over that of its `base`; `above` are the files that build on it."""
    content = read_yaml(path, f"A recipe has the keys {', '.join(Recipe.model_fields)}: correct it, or name another.")
    base = content.pop("base", None)
    if base is None:
        return content
    base_path = _find_recipe(str(base), path.parent, f"{path}: base {base!r}")
    chain = (*above, path)
    if base_path.resolve() in [file.resolve() for file in chain]:
        raise UserError(f"{path}: base {base!r} leads back to itself: {' -> '.join(map(str, (*chain, base_path)))}.")
    below = _read_with_bases(base_path, chain)
    below.pop("description", None)  # it describes another run
    return _merged(below, content)


def _merged(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings, nested ones too; of other values that both have, that of `over` wins."""
    both = {
        key: _merged(below[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **over, **both}


def parse_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe's mapping; `where` names its origin in messages."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        hint = ""
        problem = error.errors()[0]
        if problem["type"] == "extra_forbidden":
            hint = unknown_key_hint(problem["loc"])
        raise UserError(f"{where}: {first_problem(error)}.{hint}") from None


def unknown_key_hint(location: tuple[int | str, ...]) -> str:
    """Name the known keys nearest to an unknown one."""
    model: Any = Recipe
    for part in location[:-1]:
        # A number is a place in a tuple of models.
        model = typing.get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else f" Known keys: {', '.join(model.model_fields)}."


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set `a.b=value` (a YAML value) in a recipe's mapping; whether the key exists is checked with the rest."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{shown(override)}: overrides are written key=value, such as train.steps=100.")
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise UserError(f"{shown(override)}: {parent} is a value and has no keys below it.")
    place[last] = parse_yaml(text, shown(override), "Give key=value with a YAML value.")
    if isinstance(place[last], str):
        try:  # YAML 1.1 takes 1e-3 for a word
            place[last] = float(text)
        except ValueError:
            pass


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ."""
    return changed_entries(old.model_dump(mode="json"), new.model_dump(mode="json"))


def changed_entries(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys in which two nested mappings differ."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}".lstrip(".")).items()}

    before, after = flat(old, ""), flat(new, "")
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def free_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Freedom]:
    """Dotted keys that may change when a run goes on, and when: those declared by `free_field`."""
    free: dict[str, Freedom] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and "free" in field.json_schema_extra:
            free[f"{prefix}{name}"] = typing.cast(Freedom, field.json_schema_extra["free"])
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            free |= free_keys(field.annotation, f"{prefix}{name}.")
    return free
