"""Recipes: named training runs in YAML, read into one typed model. `mlcd_ds/recipes/*.yaml` holds the ones we ship.

A recipe says what is learned; `ds_configs/*.json` says how DeepSpeed does it. Each component's settings are defined
beside the component. `base: NAME`, or a path relative to the file's folder, inherits all of another recipe except its
description; the file then holds only what differs.
"""

from __future__ import annotations

import contextlib
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from mlcd_ds.artefacts.readers import parse_yaml, read_yaml
from mlcd_ds.artefacts.typed import Freedom, first_problem, shown
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.class_losses import ClassLossConfig
from mlcd_ds.objectives.registry import (
    AnyObjectiveConfig,
    kind_named,
    kind_of,
    owners_of_key,
    owners_of_section,
)
from mlcd_ds.objectives.single import DEFAULT_NAME
from mlcd_ds.recipes.sections import Sections

RECIPES = Path(__file__).resolve().parent / "recipes"


class Recipe(Sections):
    """A whole run."""

    objective: AnyObjectiveConfig = ClassLossConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.train.global_batch % self.data.num_streams:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} is not a multiple of data.num_streams "
                f"{self.data.num_streams}: change one of them"
            )
        _check_sections(self)
        kind_of(self.objective).check(self)
        for key in ("knn_every", "zeroshot_every"):
            if getattr(self.train, key) and not self.data.knn_index:
                raise ValueError(f"train.{key} is given, but data.knn_index is not: add data.knn_index=FOLDER")
        if self.train.zeroshot_every and not self.text:
            raise ValueError("train.zeroshot_every is given, but the run has no text tower: leave it out")
        if self.train.zeroshot_every and not self.data.classes:
            raise ValueError("train.zeroshot_every is given, but data.classes is not: add data.classes=FILE")
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


def _check_sections(recipe: Recipe) -> None:
    """Raise ValueError where a section that is for other objectives says something."""
    mine = kind_of(recipe.objective).sections_of(recipe)
    for section, field in type(recipe).model_fields.items():
        owners = owners_of_section(section)
        if not owners or section in mine or getattr(recipe, section) == field.default:
            continue
        given = [key for key in changed_entries(_plain(field.default), _plain(getattr(recipe, section)))]
        name = ".".join([section, *given[:1]])
        raise ValueError(_belongs_elsewhere(name, owners, recipe.objective.name))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else {}


def _belongs_elsewhere(key: str, owners: list[str], objective: str) -> str:
    return f"{key} belongs to {', '.join(owners)}; this recipe's objective is {objective}"


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
    kind = kind_named(_name_in(content, ""))
    if kind not in (None, kind_named(_name_in(below))):
        others = [name for name in Recipe.model_fields if owners_of_section(name) and name not in kind.sections]
        for section in ("objective", *others):
            below.pop(section, None)  # they are another objective's
    return _merged(below, content)


def _name_in(content: dict[str, Any], default: str = DEFAULT_NAME) -> str:
    """The name of the objective in a recipe's mapping."""
    section = content.get("objective")
    return str(section.get("name", default)) if isinstance(section, dict) else default


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
        problem = error.errors()[0]
        location, objectives = _without_names(problem["loc"])
        told, hint = first_problem(error, location), "."
        if problem["type"] == "extra_forbidden":
            told, hint = _unknown_key(told, location, objectives)
        raise UserError(f"{where}: {told}{hint}") from None


def _without_names(location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], list[str]]:
    """Pydantic puts an objective's name behind `objective` in a location: the location without it, and the names."""
    found: list[int | str] = []
    names: list[str] = []
    parts = iter(location)
    for part in parts:
        found.append(part)
        if part == "objective" and (name := next(parts, None)) is not None:
            names.append(str(name))
    return tuple(found), names


def _unknown_key(told: str, location: tuple[int | str, ...], objectives: list[str]) -> tuple[str, str]:
    """What to say of a key that its section does not have: whose it is, or the known keys nearest to it."""
    model: type[BaseModel] = Recipe
    names, name = iter(objectives), None
    for part in location[:-1]:
        name = next(names, None) if part == "objective" else None
        if (kind := kind_named(name)) is not None:
            model = kind.config_type
        elif isinstance(part, str):  # a number is a place in a tuple of models
            model = models_in(model.model_fields[part].annotation)[0]
    key = str(location[-1])
    if name is not None and (owners := owners_of_key(key)):
        return _belongs_elsewhere(".".join(map(str, location)), owners, name), "."
    near = difflib.get_close_matches(key, model.model_fields, n=3)
    return told, f". Did you mean {' or '.join(near)}?" if near else f". Known keys: {', '.join(model.model_fields)}."


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold: itself, or members of a union or a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set `a.b=value` (a YAML value) in a recipe's mapping; in a list a number is a place. Whether the key exists is
    checked with the rest."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{shown(override)}: overrides are written key=value, such as train.steps=100.")
    *parents, last = key.split(".")
    place: Any = content
    for parent in parents:
        place = place[_place_in(place, parent, override)] if isinstance(place, list) else place.setdefault(parent, {})
        if not isinstance(place, dict | list):
            raise UserError(f"{shown(override)}: {parent} is a value and has no keys below it.")
    value = parse_yaml(text, shown(override), "Give key=value with a YAML value.")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 takes 1e-3 for a word
            value = float(text)
    place[_place_in(place, last, override) if isinstance(place, list) else last] = value


def _place_in(values: list[Any], key: str, override: str) -> int:
    """A place in a list. UserError where it has none of that number."""
    if not key.isdecimal() or int(key) >= len(values):
        raise UserError(f"{shown(override)}: {key} is no place in a list of {len(values)}, counted from 0.")
    return int(key)


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
        elif typing.get_origin(field.annotation) is not tuple:
            for inner in models_in(field.annotation):
                free |= free_keys(inner, f"{prefix}{name}.")
    return free
