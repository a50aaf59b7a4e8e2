"""Recipes, DeepSpeed configs, schedule and optimizer groups: what a user writes, and what becomes of it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from mlcd_ds.config import (
    Recipe,
    apply_override,
    changed_keys,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
)
from mlcd_ds.distributed.ds_config import (
    ELSEWHERE,
    check_zero_section,
    fill_ds_config,
    read_ds_config,
    tensor_parallel_size,
)
from mlcd_ds.engine.engine_config import resolve_ds_config
from mlcd_ds.engine.hardware import GPUS, gpu_named
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.optimizer import backbone_optimizer, set_learning_rate
from mlcd_ds.engine.phases import Phase, phase_at, phases
from mlcd_ds.engine.precision import decide_precision
from mlcd_ds.engine.schedule import learning_rate
from mlcd_ds.errors import UserError
from mlcd_ds.models.towers import Towers
from mlcd_ds.models.vit import ViT, ViTConfig
from mlcd_ds.objectives.class_centres import head_config
from mlcd_ds.recipes.sections import OptimizerConfig

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
MODEL = {"image_size": 32, "patch_size": 16, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "embed_dim": 16}
TEXT = {"width": 32, "depth": 1, "heads": 4, "mlp_width": 64, "embed_dim": 16}
CLIP = {"objective": {"name": "clip"}, "text": TEXT}


def content(**sections: dict[str, Any]) -> dict[str, Any]:
    """A small valid recipe, with some sections changed."""
    base: dict[str, Any] = {
        "description": "a test",
        "model": dict(MODEL),
        "data": {"num_streams": 6},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 8, "global_batch": 24, "precision": "fp32"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base


# --- schedule


def test_schedule_rises_linearly_and_falls_by_half_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[9] == rates[10] == 2.0 and max(rates) == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half-way
    assert rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (2, 1), (3, 2), (2, 0)])
def test_schedule_of_very_short_runs_is_finite_and_positive_before_the_end(steps: int, warmup_steps: int) -> None:
    rates = [learning_rate(step, steps, OptimizerConfig(lr=1.0, warmup_steps=warmup_steps)) for step in range(steps)]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates) and rates[0] > 0


def test_constant_schedule_and_cooldown() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=10, schedule="constant", cooldown_steps=20, final_lr=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)]) and set(rates[9:81]) == {2.0}
    assert rates[90] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)) and rates[100] == pytest.approx(0.2)
    longer = [learning_rate(step, 201, config) for step in range(181)]
    assert longer[:81] == rates[:81] and longer[180] == 2.0, "a longer run begins as the shorter one does"
    without = OptimizerConfig(lr=2.0, warmup_steps=10, schedule="constant")
    assert {learning_rate(step, 101, without) for step in range(9, 101)} == {2.0}, "to the last step"


# --- optimizer groups


def test_layer_decay() -> None:
    model = ViT(ViTConfig(**{**MODEL, "positions": "rope2d"}))
    optimizer = backbone_optimizer(Towers({"image": model}), OptimizerConfig(lr=1.0, warmup_steps=0, layer_decay=0.5))
    set_learning_rate(optimizer, 0.8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == set(names.values())
    last = MODEL["depth"] + 1
    assert rates["projection.weight"] == (0.8, 0.2)
    assert rates["encoder.layers.0.mlp.fc1.weight"] == pytest.approx((0.8 * 0.5 ** (last - 1), 0.2))
    assert rates["embeddings.class_embedding"] == pytest.approx((0.8 * 0.5**last, 0.0))
    assert rates["rotary.class_pos_emb"] == pytest.approx((0.8 * 0.5**last, 0.0))


def test_decay_is_on_matrices_only() -> None:
    model = ViT(ViTConfig(**MODEL))
    optimizer = backbone_optimizer(Towers({"image": model}), OptimizerConfig(lr=1e-3, weight_decay=0.2, warmup_steps=0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert decayed | plain == set(names.values()) and not decayed & plain, "every parameter is in one group"
    assert all(name.endswith(("norm.weight", "bias")) or "norm" in name or "embed" in name for name in plain), plain
    assert any("class_embedding" in name for name in plain) and any("position_embedding" in name for name in plain)
    assert "projection.weight" in decayed and any("patch_embedding" in name for name in decayed)
    assert all(dict(model.named_parameters())[name].ndim >= 2 for name in decayed)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_tower_that_is_to_stay_as_it_is_gets_no_rate() -> None:
    towers = Towers({"image": nn.Linear(2, 2), "text": nn.Linear(2, 2)})
    towers.image.config = towers.text.config = SimpleNamespace(depth=0)
    optimizer = backbone_optimizer(towers, OptimizerConfig(lr=1e-3, warmup_steps=0))
    set_learning_rate(optimizer, 0.25, ("image",))
    names = {id(parameter): name for name, parameter in towers.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {"image.weight": 0.0, "image.bias": 0.0, "text.weight": 0.25, "text.bias": 0.25}
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}, "and its own again"


# --- DeepSpeed's JSON


def write(tmp_path: Path, config: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_our_configs_pass_their_own_checks(path: Path) -> None:
    config = read_ds_config(path)
    assert check_zero_section(config, path) in (0, 1, 2, 3)


@pytest.mark.parametrize("key", ["zero_optimisation", "gradient_cliping", "Optimizer"])
def test_unknown_keys_are_named(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, {key: 1})
    with pytest.raises(UserError, match=f"{path}: unknown key '{key}'"):
        read_ds_config(path)


@pytest.mark.parametrize("key", ELSEWHERE)
def test_keys_of_the_recipe_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is not set here"):
        read_ds_config(write(tmp_path, {key: {"type": "AdamW"}}))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_ds_config(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_ds_config(write(tmp_path, "{"))


def test_a_contradiction_names_both_sides() -> None:
    values = {"train_batch_size": (24, "train.global_batch in the recipe"), "bf16.enabled": (False, "train.precision")}
    filled = fill_ds_config({"train_batch_size": "auto", "bf16": {"enabled": False}}, Path("ds.json"), values)
    assert filled == {"train_batch_size": 24, "bf16": {"enabled": False}}
    assert fill_ds_config({}, Path("ds.json"), values) == filled, "what is not said is filled in"
    with pytest.raises(UserError, match=r"train_batch_size is 32, but train.global_batch in the recipe makes it 24"):
        fill_ds_config({"train_batch_size": 32}, Path("ds.json"), values)
    with pytest.raises(UserError, match=r"bf16.enabled is True, but train.precision makes it False"):
        fill_ds_config({"bf16": {"enabled": True}}, Path("ds.json"), values)


def test_filling_leaves_the_file_s_own_content_alone() -> None:
    config = {"bf16": {"enabled": "auto"}}
    fill_ds_config(config, Path("ds.json"), {"bf16.enabled": (True, "x")})
    assert config == {"bf16": {"enabled": "auto"}}


def test_auto_that_nobody_fills_is_named() -> None:
    with pytest.raises(UserError, match=r"zero_optimization.reduce_bucket_size cannot be \"auto\""):
        fill_ds_config({"zero_optimization": {"reduce_bucket_size": "auto"}}, Path("ds.json"), {})


def test_a_misspelt_zero_key_is_named() -> None:
    with pytest.raises(UserError, match="overlap_com"):
        check_zero_section({"zero_optimization": {"stage": 1, "overlap_com": True}}, Path("ds.json"))
    assert check_zero_section({"zero_optimization": {"stage": 2}}, Path("ds.json")) == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"compute_grad_norm": False, "stage": 1}, "compute_grad_norm: without it a gradient"),
        ({"round_robin_gradients": True}, "round_robin_gradients would spoil checkpoints"),
        ({"offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs DeepSpeed's own AdamW"),
        ({"offload_param": {"device": "nvme"}, "stage": 3}, "offload_param must have device cpu"),
    ],
)
def test_what_zero_may_not_do_is_refused(section: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_zero_section({"zero_optimization": section}, Path("ds.json"))


def test_muon_with_another_type_of_sums_is_refused() -> None:
    recipe, layout = load_recipe("demo", ("optimizer.name=muon",)), Layout(1, 1, 1)
    config = {"data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(UserError, match="grad_accum_dtype is not for optimizer"):
        resolve_ds_config(config, Path("ds.json"), recipe, layout, plan_batches(recipe, layout, 0))


@pytest.mark.parametrize("section", [{"bf16": True}, {"zero_optimization": 1}])
def test_a_value_where_a_section_belongs_is_named(section: dict[str, Any]) -> None:
    key = next(iter(section))
    with pytest.raises(UserError, match=key):
        filled = fill_ds_config(section, Path("ds.json"), {"bf16.enabled": (False, "train.precision")})
        check_zero_section(filled, Path("ds.json"))


def test_a_config_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_ds_config(write(tmp_path, "[1]"))


# --- recipes


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_say_what_to_expect(name: str) -> None:
    assert len(load_recipe(name).description) > 20


def test_dump_and_load_round_trip(tmp_path: Path) -> None:
    recipe = parse_recipe(content(data={"index": "a/b"}, head={"sample_rate": 0.5}), "here")
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe
    assert changed_keys(recipe, load_recipe(str(path))) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"global_bach": 1}}, "train.global_bach.*Did you mean global_batch"),
        ({"trian": {}}, "trian.*Did you mean train"),
        ({"head": {"sample_rates": 1}}, "Did you mean sample_rate"),
        ({"data": {"augment": {"flp": True}}}, "Did you mean flip"),
        ({"model": {"dept": 1}}, "Did you mean depth"),
        ({"train": {"zzz": 1}}, "Known keys: out, init_from, steps"),
        ({"head": {"sample_rate": 0.0}}, "head.sample_rate.*greater than 0"),
        ({"head": {"sample_rate": 1.5}}, "head.sample_rate.*1.5"),
        ({"train": {"precision": "int8"}}, "train.precision.*int8"),
        ({"train": {"global_batch": 20}}, "train.global_batch 20 .*data.num_streams 6"),
        ({"optimizer": {"warmup_steps": 8}}, "optimizer.warmup_steps 8 .*train.steps 8"),
        ({"optimizer": {"cooldown_steps": 2}}, "optimizer.cooldown_steps is for optimizer.schedule=constant"),
        ({"optimizer": {"cooldown_steps": 8, "schedule": "constant"}}, "2 and cooldown_steps 8 .*train.steps 8"),
        ({"model": {"patch_size": 15}}, "image_size 32 is not a multiple of patch_size 15"),
        ({"objective": {"scale": 76.0}}, "objective.scale.*75"),
        ({"objective": {"name": "unicom", "num_labels": 8}}, "unicom takes one label"),
        ({"objective": {"num_labels": 8, "drawn_labels": 9}}, "objective: .*drawn_labels 9 is more than num_labels 8"),
        ({"objective": {"separate_samples": True}}, "objective: .*separate_samples is for name averaged_softmax"),
        ({"objective": {"similarity_filter": 1.0}}, "objective.similarity_filter: .*less than 1"),
        ({"objective": {"name": "nosuch"}}, "objective: .*'nosuch'.*'mlcd', .*'clip'"),
        (
            {"objective": {"name": "mlc", "temperature": 0.1}},
            "objective.temperature belongs to clip, .*; this .* is mlc",
        ),
        ({"objective": {"name": "clip", "margin": 0.1}}, "objective.margin belongs to mlcd, mlc, .*; this .* is clip"),
        ({"objective": {"name": "clip", "temprature": 0.1}}, "objective.temprature: .*Did you mean temperature"),
        ({"towers": {"image": "frozen"}}, "towers.image belongs to clip, siglip, .*; this recipe's objective is mlcd"),
        ({"objective": {"name": "clip"}}, "clip needs a text tower: add text"),
        ({"text": TEXT}, "text.* belongs to clip, siglip, .*; this recipe's objective is mlcd"),
        (
            {"objective": {"name": "clip"}, "text": {**TEXT, "embed_dim": 8}},
            "text.embed_dim 8 is not model.embed_dim 16",
        ),
        ({**CLIP, "towers": {"image": "frozen"}}, "towers.image is frozen, .*--init-from"),
        ({**CLIP, "towers": {"image": "frozen", "text": "frozen"}}, "nothing is left to train"),
        ({**CLIP, "text": {**TEXT, "hads": 2}}, "text.hads: .*Did you mean heads"),
        ({"objective": {"name": "clip", "temperature": 2}}, "objective.temperature: .*less than or equal to 1"),
        (
            {"objective": {"name": "siglip"}, "head": {"sample_rate": 0.5}},
            "head.sample_rate belongs to mlcd, .* siglip",
        ),
        ({"optimizer": {"betas": [1.5, 0.9]}}, r"optimizer.betas.0: .*less than 1 \(got 1.5"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"lr": math.nan}}, r"optimizer.lr: .*finite number \(got nan"),
        ({"optimizer": {"clip_norm": math.inf}}, "optimizer.clip_norm: .*finite number"),
        (
            {"data": {"augment": {"crop_area": [1.5, 2]}}},
            r"data.augment: crop_area is \[1.5, 2.0\].*up to 1",
        ),
        ({"data": {"augment": {"crop_area": [0, 0]}}}, r"crop_area is \[0.0, 0.0\]"),
        ({"data": {"augment": {"crop_area": [1, 0.5]}}}, r"crop_area is \[1.0, 0.5\]: give the smaller number first"),
        ({"data": {"augment": {"crop_area": []}}}, "crop_area"),
        ({"data": {"augment": {"crop_aspect": [-1, 1]}}}, r"crop_aspect is \[-1.0, 1.0\]"),
        ({"data": {"augment": {"crop_aspect": [0, 1]}}}, r"crop_aspect is \[0.0, 1.0\]"),
        ({"data": {"num_threads": 100_000}}, "data.num_threads: .*512"),
        ({"data": {"index": "a\0b"}}, "data.index: no file can have this name"),
        ({"train": {"steps": 10**10}}, "train.steps"),
        ({"train": {"global_batch": 10**9}}, "train.global_batch"),
        ({"model": {"image_size": 10**9}}, "model.image_size"),
        ({"model": {"depth": 10**6}}, "model.depth"),
        ({"model": {"image_size": 4096, "patch_size": 8}}, "262144 patches, more than 65,536: raise patch_size"),
    ],
)
def test_a_bad_recipe_names_place_and_fix(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^here: .*{message}"):
        parse_recipe(content(**sections), "here")


def test_recipes_are_frozen() -> None:
    recipe = parse_recipe(content(), "here")
    with pytest.raises(ValidationError):
        recipe.train.steps = 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=12", 12),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.betas=[0.8, 0.9]", [0.8, 0.9]),
        ("data.augment.flip=false", False),
        ("train.micro_batch_per_rank=null", None),
        ("data.index=some/path", "some/path"),
        ("description=a=b", "a=b"),
    ],
)
def test_overrides_are_yaml_values(override: str, expected: Any) -> None:
    target = content()
    apply_override(target, override)
    for key in override.split("=")[0].split("."):
        target = target[key]
    assert target == expected


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.more=1", "train.steps=[1"])
def test_bad_overrides_are_quoted(override: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_override(content(), override)
    assert repr(override) in str(caught.value)


def test_recipe_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(UserError, match=r"no such file, and not one of clip_vit_b_32, demo"):
        load_recipe("nosuch")
    for text, message in [("a: [", "cannot be read"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(str(path))
    path.write_text(yaml.safe_dump({**content(), "train": None}))
    with pytest.raises(UserError, match="train"):
        load_recipe(str(path))
    with pytest.raises(UserError, match=r"train\.steps"):
        load_recipe(str(path), ("train.steps=3x",))


ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 8)}]\n" for before, name in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ALIAS_BOMB.encode(), "aliases"),
        (b"train: {steps: 1, steps: 2}", "'steps' is given twice"),
        (b"description: \xff\xfe", "cannot be read"),
        (b"train: {steps: " + b"9" * 5000 + b"}", "cannot be read"),
        (b"train: {steps: 0x" + b"f" * 5000 + b"}", "a very long dict"),
        (b"x" * 100_000 + b": 1", "xxxxx"),
        (b"description: [" + b"[1]," * 5000 + b"]", "description"),
        (None, "Is a directory"),
    ],
)
def test_strange_recipe_files_get_one_short_message(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_compiled_blocks_are_not_for_stage_3() -> None:
    recipe = load_recipe("demo", ("train.compile=true",))
    with pytest.raises(UserError, match=r"train.compile is not for ZeRO stage 3.*take stage 1 or 2"):
        plan_batches(recipe, Layout(2, 1, 3), 0)
    assert plan_batches(recipe, Layout(2, 1, 2), 0).streams


def test_changed_keys_are_dotted() -> None:
    old = parse_recipe(content(), "here")
    new = parse_recipe(content(optimizer={"lr": 2e-3}, data={"augment": {"flip": False}}), "here")
    assert changed_keys(old, new) == ["data.augment.flip", "optimizer.lr"]
    assert isinstance(new, Recipe)


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": "auto"}}, "bf16"),
        ({"fp16": {"enabled": "auto"}}, "fp16"),
    ],
)
def test_precision_auto_follows_the_deepspeed_file(config: dict, precision: str) -> None:
    recipe = load_recipe("demo")
    assert recipe.train.precision == "auto"
    decided = decide_precision(recipe, config, Path("ds.json"))
    assert decided.train.precision == precision and changed_keys(recipe, decided) == ["train.precision"]
    assert head_config(decided, torch.device("cpu")).precision == ("fp32" if precision == "fp32" else "bf16")
    stated = load_recipe("vit_l_14", ("head.precision=fp32",))
    assert decide_precision(stated, config, Path("ds.json")) == stated, "what is said stays"
    assert head_config(stated, torch.device("cpu")).precision == "fp32"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"autotp_size": 0}, "autotp_size is 0: it must be a whole number"),
        ({"autotp_size": 2, "partition_config": {}}, "tensor_parallel.partition_config is not set here"),
        (2, "tensor_parallel must be a mapping"),
    ],
)
def test_tensor_parallel_sections_are_checked(section: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tensor_parallel_size({"tensor_parallel": section}, Path("ds.json"))
    assert tensor_parallel_size({}, Path("ds.json")) == 1
    assert tensor_parallel_size({"tensor_parallel": {"autotp_size": 4}}, Path("ds.json")) == 4


def test_phases_come_before_the_rest_of_the_run() -> None:
    phases_given = "[{until: 1000, image_size: 32, token_drop: 0.75}, {until: 1500, image_size: 48}]"
    recipe = load_recipe("demo", (f"train.phases={phases_given}",))
    expected = [Phase(0, 1000, 32, 0.75), Phase(1000, 1500, 48, 0.5), Phase(1500, 2400, 64, 0.5)]
    assert list(phases(recipe)) == expected
    assert [phase_at(recipe, step) for step in (0, 999, 1000, 1499, 1500, 2399)] == [
        phase for phase in expected for _ in (0, 1)
    ]
    assert list(phases(load_recipe("demo"))) == [Phase(0, 2400, 64, 0.5)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{until: 2400}]", r"train.phases end after \[2400\] steps: .* below train.steps 2400"),
        ("[{until: 20}, {until: 10}]", r"end after \[20, 10\] steps"),
        ("[{until: 20, image_size: 30}]", "image_size 30, no multiple of model.patch_size 8"),
        ("[{until: 20, size: 30}]", "Known keys: until, image_size"),
    ],
)
def test_phases_that_cannot_be_are_named(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("demo", (f"train.phases={given}",))


def test_gpus_are_known_by_the_names_cuda_gives_them() -> None:
    assert gpu_named("NVIDIA A100-SXM4-80GB") is GPUS["a100-80gb"]
    assert gpu_named("NVIDIA A100-PCIE-40GB") is GPUS["a100-40gb"]
    assert gpu_named("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_named("NVIDIA GeForce RTX 4090") is None
