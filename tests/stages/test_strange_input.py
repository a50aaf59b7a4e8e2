"""Values that nobody should type, in recipes, overrides, DeepSpeed files and flags, drawn with fixed seeds: a command
either is accepted or gets one short line; never a stack trace."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from shard_maker import run_stage

from mlcd_ds.config import load_recipe
from mlcd_ds.distributed.ds_config import choose_accelerator
from mlcd_ds.distributed.ds_sections import SECTIONS, DeepSpeedFile, _models_of_deepspeed

NUM_DRAWS = 40
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**9,
    10**19,
    -(10**30),
    1e300,
    1e-300,
    -0.0,
    0.5,
    1.5,
    float("nan"),
    float("inf"),
]
VALUES += [
    "",
    "x",
    "auto",
    "1",
    "\u00e9",
    "a" * 5000,
    "\0",
    "\x1b[31m",
    "/",
    "/dev/null",
    [],
    [1],
    [1, 0],
    [-1, 1],
    ["a"],
    {},
]
VALUES += [{"a": 1}, {"device": "cpu"}, [[[]]]]
BYTES = [
    b"",
    b"\xff\xfe",
    b"\0" * 9,
    b"[" * 9999,
    b"{" * 9999,
    b"a: &a [*a]\n",
    b'{"a": 1, "a": 2}',
    b"1: 2\n",
    b"<<: 3\n",
]
BYTES += [b"? [1]\n: 2\n", b"--- a\n--- b\n", b"train: {steps: " + b"9" * 5000 + b"}", b"%YAML 9.9\n---\n", b"\t- ["]
TEXTS = [
    "",
    "0",
    "-1",
    "1",
    "nan",
    "inf",
    "1e400",
    "9" * 5000,
    "\u00e9",
    "/",
    "/dev/null",
    "a" * 300,
    "a" * 5000,
    "\udcff",
    "*",
    "x/y",
    "[",
]
SOUND = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}}
NO_DATA = ["data.index=null", "data.labels=null"]


def paths(content: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def changed(content: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    copied = json.loads(json.dumps(content))
    place = copied
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    return copied


def check(stage: str, arguments: list[str]) -> None:
    done = run_stage(stage, *arguments)
    errors = [line for line in done.err.splitlines() if "error: " in line]
    assert (done.status, len(errors)) in ((0, 0), (2, 1)), (stage, arguments, done)
    assert all(len(line) < 1000 for line in errors) and "Traceback" not in done.err, (stage, arguments, done)


def check_train(recipe: Path | str, config: Path, *overrides: str) -> None:
    check("train", ["--dry-run", "--recipe", str(recipe), "--deepspeed_config", str(config), *NO_DATA, *overrides])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "ds.json").write_text(json.dumps(SOUND))
    return tmp_path / "ds.json"


def test_recipes(tmp_path: Path, config: Path) -> None:
    draw, path = random.Random(1), tmp_path / "recipe.yaml"
    sound = load_recipe("demo").model_dump(mode="json")
    for _ in range(NUM_DRAWS):
        content = changed(sound, draw.choice([*paths(sound)]), draw.choice(VALUES))
        path.write_text(yaml.safe_dump(content, allow_unicode=draw.random() < 0.5))
        check_train(path, config)


def test_overrides(config: Path) -> None:
    draw = random.Random(2)
    keys = [".".join(path) for path in paths(load_recipe("demo").model_dump(mode="json"))]
    for _ in range(NUM_DRAWS):
        key, value = (
            draw.choice(keys) + draw.choice(["", "", "", ".x", ".0"]),
            draw.choice([*TEXTS, "&a [*a]", "{}", "[1, 2]"]),
        )
        check_train("demo", config, draw.choice([f"{key}={value}", f"{key}={value}", key, f"={value}"]))


def test_deepspeed_files(config: Path) -> None:
    choose_accelerator()
    draw, keys = random.Random(3), [(key,) for key in (*DeepSpeedFile.model_fields, "typo")]
    for name, model in {**SECTIONS, **_models_of_deepspeed()}.items():
        keys += [(name, key) for key in (*model.model_fields, "typo", "strict", "self")]
    keys += [("tensor_parallel", "autotp_size"), ("zero_optimization", "offload_param", "device")]
    for _ in range(2 * NUM_DRAWS):
        config.write_text(json.dumps(changed(SOUND, draw.choice(keys), draw.choice(VALUES))))
        check_train("demo", config)


def test_bytes(tmp_path: Path, config: Path) -> None:
    for content in BYTES:
        for name in ("recipe.yaml", "other.json"):
            (tmp_path / name).write_bytes(content)
        check_train(tmp_path / "recipe.yaml", config)
        check_train("demo", tmp_path / "other.json")
    for path in (tmp_path, Path("/dev/null"), Path("a" * 5000), Path("a" * 5000 + ".yaml")):
        check_train(path, config)
        check_train("demo", path)


@pytest.mark.parametrize("stage", ["index", "embed", "cluster", "assign", "evaluate", "export"])
def test_flags(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw, options = random.Random(stage), importlib.import_module(f"mlcd_ds.stages.{stage}").Options
    for _ in range(NUM_DRAWS // 3):
        arguments = ["--dry-run"]
        for key, field in options.model_fields.items():
            if field.annotation is not bool and (field.is_required() or draw.random() < 0.3):
                arguments += ["--" + key.replace("_", "-"), draw.choice(TEXTS)]
        check(stage, arguments)


def test_plans_flags() -> None:
    for flag in (
        "gpus",
        "gpu",
        "zero",
        "tensor-parallel",
        "num-centers",
        "embedding-dim",
        "mfu",
        "recipe",
        "deepspeed_config",
    ):
        for value in ("-1", "x", "nan", "9" * 5000, "a" * 5000, "/"):
            check("plan", [f"--{flag}", value])


def test_stages() -> None:
    for name in ("", "x", "a" * 5000, "--x"):
        check("cli", [name])
