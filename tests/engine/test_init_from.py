"""Starting from given weights: the same features, resized positions, and clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_harness import TinyData
from safetensors.torch import save_file

from mlcd_ds.artefacts.files import record_of, write_json
from mlcd_ds.config import Recipe, dump_recipe, load_recipe
from mlcd_ds.data.fields import Labels, TrainingData
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.init_from import Start, find_start
from mlcd_ds.engine.released import load_released
from mlcd_ds.engine.weights import BACKBONE_NAME, CHECKPOINT_NAME, CONFIG_NAME, CheckpointManifest
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import to_vision_model, vision_config
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.vit import ViT, ViTConfig

CONFIG = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, embed_dim=16)


def make_model(config: ViTConfig, seed: int) -> ViT:
    model = ViT(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, ViT]:
    model, folder = make_model(CONFIG, 1), tmp_path / "released"
    folder.mkdir()
    save_file(to_vision_model(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vision_config(CONFIG)))
    save_file({"projection.weight": model.projection.weight.detach()}, folder / "projection.safetensors")
    return folder, model


def test_the_same_shape_is_a_copy(released: tuple[Path, ViT]) -> None:
    folder, model = released
    started = make_model(CONFIG, 2)
    assert load_released(folder, started) == []
    for name, weight in model.state_dict().items():
        assert torch.equal(started.state_dict()[name], weight), name


def test_another_resolution_and_embedding(released: tuple[Path, ViT]) -> None:
    folder, model = released
    larger = CONFIG.model_copy(update={"image_size": 48, "embed_dim": 8})
    started = make_model(larger, 2)
    fresh = started.projection.weight.detach().clone()
    notes = load_released(folder, started)
    assert notes == ["positions resized from 32 to 48 px", "the projection starts at random"]
    assert torch.equal(started.projection.weight, fresh)
    grid = model.embeddings.position_embedding.weight[1:].reshape(4, 4, 32).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    positions = started.embeddings.position_embedding.weight
    assert torch.equal(positions[0], model.embeddings.position_embedding.weight[0])
    assert torch.allclose(positions[1:], expected, atol=1e-6)
    assert not torch.allclose(positions[1:], expected.reshape(6, 6, 32).transpose(0, 1).reshape(36, 32), atol=1e-2)


def test_constant_positions_stay_constant() -> None:
    resized = resize_positions(torch.cat([torch.zeros(1, 3), torch.full((16, 3), 2.5)]), 49)
    assert torch.allclose(resized, torch.cat([torch.zeros(1, 3), torch.full((49, 3), 2.5)]))


def test_what_does_not_fit_is_named(released: tuple[Path, ViT], tmp_path: Path) -> None:
    folder, _ = released
    with pytest.raises(UserError, match=r"released has width 32, model.width is 64"):
        load_released(folder, make_model(CONFIG.model_copy(update={"width": 64}), 2))
    with pytest.raises(UserError, match=r"has activation quick_gelu, model.activation is gelu"):
        load_released(folder, make_model(CONFIG.model_copy(update={"activation": "gelu"}), 2))
    with pytest.raises(UserError, match=r"nowhere/config.json is missing. train.init_from takes"):
        load_released(tmp_path / "nowhere", make_model(CONFIG, 2))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match=r"broken/model.safetensors cannot be read: .* train.init_from takes"):
        load_released(broken, make_model(CONFIG, 2))


# --- from a run


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def data(tiny_data: TinyData) -> TrainingData:
    index = ShardIndex(tiny_data.index)
    return TrainingData(index, {"labels": Labels(LabelStore(tiny_data.labels, index))})


def recipe_of(out: Path, config: ViTConfig, *overrides: str) -> Recipe:
    return load_recipe("demo", (f"train.out={out}", f"model={json.dumps(config.model_dump())}", *overrides))


def make_run(out: Path, config: ViTConfig, data: TrainingData, steps: tuple[int, ...] = (5,)) -> dict[int, ViT]:
    """A run's folder with a backbone a checkpoint, by step."""
    recipe, models = recipe_of(out, config), {}
    for step in steps:
        models[step], folder = make_model(config, step), out / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        save_file(models[step].state_dict(), folder / BACKBONE_NAME)
        manifest = CheckpointManifest(
            step=step,
            num_ranks=1,
            zero_stage=1,
            objective={"num_classes": data.labels.num_centers},
            inputs={"clusters": data.labels.manifest.inputs["clusters"], "labels": "of other images"},
            recipe=recipe.model_dump(mode="json"),
            files={BACKBONE_NAME: record_of(folder / BACKBONE_NAME)},
            versions={},
            git_commit=None,
        )
        write_json(folder / CHECKPOINT_NAME, manifest.model_dump(mode="json"))
    out.mkdir(exist_ok=True)
    (out / CONFIG_NAME).write_text(dump_recipe(recipe))
    return models


def start_of(out: Path, given: Path, config: ViTConfig, data: TrainingData, group: Group) -> Start | None:
    return find_start(recipe_of(out, config, f"train.init_from={given}"), data, group)


def test_a_run_starts_from_its_newest_checkpoint_or_the_one_that_is_named(
    tmp_path: Path, data: TrainingData, group: Group
) -> None:
    models = make_run(tmp_path / "run", CONFIG, data, steps=(5, 9))
    for folder, step in ((tmp_path / "run", 9), (tmp_path / "run/checkpoints/step_00000005", 5)):
        start = start_of(tmp_path / "new", folder, CONFIG, data, group)
        assert start and start.checkpoint and start.checkpoint.step == step
        started = make_model(CONFIG, 2)
        assert start.fill_tower(started) == ["the backbone"]
        for name, weight in models[step].state_dict().items():
            assert torch.equal(started.state_dict()[name], weight), name
    own = start_of(tmp_path / "run", tmp_path / "run", CONFIG, data, group)
    assert own is None, "a run goes on from its own checkpoints"


def test_a_run_at_another_resolution_keeps_its_projection(tmp_path: Path, data: TrainingData, group: Group) -> None:
    model = make_run(tmp_path / "run", CONFIG, data)[5]
    config = CONFIG.model_copy(update={"image_size": 48, "num_registers": 2})
    start, started = start_of(tmp_path / "new", tmp_path / "run", config, data, group), make_model(config, 2)
    notes = ["the backbone", "positions resized from 32 to 48 px", "the registers start at random"]
    assert start and start.fill_tower(started) == notes
    assert torch.equal(started.projection.weight, model.projection.weight)
    positions = model.embeddings.position_embedding.weight
    assert torch.equal(started.embeddings.position_embedding.weight, resize_positions(positions, 36))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embed_dim": 8}, r"step_00000005 has an embedding of 16, model.embed_dim is 8: take that, or .*export"),
        ({"width": 64}, r"step_00000005 has width 32, model.width is 64"),
        ({"num_registers": 1}, r"has num_registers 2, model.num_registers is 1"),
    ],
)
def test_a_run_of_another_shape_is_named(
    tmp_path: Path, data: TrainingData, group: Group, changed: dict, message: str
) -> None:
    config = CONFIG.model_copy(update={"num_registers": 2})
    make_run(tmp_path / "run", config, data)
    assert start_of(tmp_path / "new", tmp_path / "run", config, data, group)
    with pytest.raises(UserError, match=message):
        start_of(tmp_path / "new", tmp_path / "run", config.model_copy(update=changed), data, group)


def test_a_damaged_backbone_is_named(tmp_path: Path, data: TrainingData, group: Group) -> None:
    make_run(tmp_path / "run", CONFIG, data)
    path = tmp_path / "run/checkpoints/step_00000005" / BACKBONE_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    start = start_of(tmp_path / "new", tmp_path / "run", CONFIG, data, group)
    with pytest.raises(UserError, match=str(path)):
        assert start and start.fill_tower(make_model(CONFIG, 2))


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path, data: TrainingData, group: Group) -> None:
    make_run(tmp_path / "run", CONFIG, data, steps=())
    with pytest.raises(UserError, match=r"run has no whole checkpoint yet"):
        start_of(tmp_path / "new", tmp_path / "run", CONFIG, data, group)


@pytest.mark.parametrize(
    ("num_classes", "inputs", "message"),
    [
        (25, {"clusters": "OURS", "labels": "others"}, None),
        (25, {"labels": "OURS"}, None),
        (24, {"clusters": "OURS"}, r"has 24 centres, \S+/labels names 25. Give labels of its clusters"),
        (25, {"clusters": "others", "labels": "OURS"}, r"other clusters than those of \S+/labels. Give labels of its"),
        (25, {"labels": "others"}, r"other clusters than those of"),
    ],
)
def test_the_labels_of_the_new_run_name_the_same_clusters(
    tmp_path: Path, data: TrainingData, group: Group, num_classes: int, inputs: dict[str, str], message: str | None
) -> None:
    make_run(tmp_path / "run", CONFIG, data)
    ours = {"clusters": data.labels.manifest.inputs["clusters"], "labels": data.labels.manifest.fingerprint}
    inputs = {role: ours[role] if value == "OURS" else value for role, value in inputs.items()}
    path = tmp_path / "run/checkpoints/step_00000005" / CHECKPOINT_NAME
    content = json.loads(path.read_text())
    content["objective"] = {"num_classes": num_classes}
    if "clusters" not in inputs:  # an earlier version
        content |= {"num_classes": content.pop("objective")["num_classes"]}
    write_json(path, content | {"inputs": inputs})
    if message is None:
        assert start_of(tmp_path / "new", tmp_path / "run", CONFIG, data, group)
    else:
        with pytest.raises(UserError, match=message):
            start_of(tmp_path / "new", tmp_path / "run", CONFIG, data, group)


def test_a_hugging_face_folder_has_no_head(
    released: tuple[Path, ViT], tmp_path: Path, data: TrainingData, group: Group
) -> None:
    start = start_of(tmp_path / "new", released[0], CONFIG, data, group)
    assert start and start.checkpoint is None
    assert start.fill_tower(make_model(CONFIG, 2)) == ["the backbone"]
