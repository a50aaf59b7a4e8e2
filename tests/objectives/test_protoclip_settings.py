"""ProtoCLIP's settings: when episodes begin and end, what is refused and how, what a dry run and a plan say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed_harness import TinyData
from embeddings_maker import blobs, write_embeddings

from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.config import Recipe, load_recipe, parse_recipe
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.base import PlannedRun
from mlcd_ds.objectives.episode_plan import EpisodePlan
from mlcd_ds.objectives.protoclip import ProtoClip

TOWER = {"width": 32, "depth": 1, "heads": 4, "mlp_width": 64, "embed_dim": 16}


def make_recipe(
    train: dict[str, Any] | None = None,
    towers: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **objective: Any,
) -> Recipe:
    content: dict[str, Any] = {
        "description": "a test",
        "model": {"image_size": 32, "patch_size": 16, **TOWER},
        "text": dict(TOWER),
        "data": {"num_streams": 4, **(data or {})},
        "objective": {"name": "protoclip", "episode_samples": 96, "num_clusters": 10, **objective},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 20, "global_batch": 24, "precision": "fp32", **(train or {})},
        "towers": towers or {},
    }
    return parse_recipe(content, "here")


def test_episodes_follow_each_other() -> None:
    plan = EpisodePlan.of(make_recipe(infonce_episodes=2))
    assert plan.num_episodes == 5 and plan.steps == 4
    assert [plan.episode_of(step) for step in (0, 3, 4, 19)] == [0, 0, 1, 4]
    assert [plan.has_prototypes(number) for number in range(5)] == [False, False, True, False, False]
    assert [plan.is_still(number) for number in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episode_samples": 100}, "episode_samples 100 is not a multiple of train.global_batch 24: .*=96"),
        ({"episode_samples": 5, "num_clusters": 2}, "set objective.episode_samples=24"),
        ({"train": {"steps": 22}}, "train.steps 22 is not a multiple of the 4 steps of an episode .*train.steps=24"),
        ({"infonce_episodes": 3}, "infonce_episodes 3 and objective.frozen_episodes 2 leave none of the 5 episodes"),
        ({"num_clusters": 97}, "num_clusters 97 is more than objective.episode_samples 96: lower it"),
        (
            {"teacher": "x", "back_translation": False},
            "set objective.back_translation=true, or leave objective.teacher",
        ),
        (
            {"towers": {"image": "frozen"}, "train": {"init_from": "x"}},
            "towers.image is frozen, and protoclip clusters what both towers learn: train both",
        ),
        ({"data": {"captions": "lines"}}, "objective.with_replacement takes a sample twice, and data.captions=lines"),
        ({"targets": "softer"}, "objective.*targets"),
    ],
)
def test_what_does_not_go_together_is_named_with_the_fix(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{message}"):
        make_recipe(**settings)


def test_data_that_do_not_fit_are_named(tiny_data: TinyData, tmp_path: Path) -> None:
    data = TrainingData(ShardIndex(tiny_data.index), {})
    dim = EmbeddingStore(tiny_data.embeddings).dim
    ProtoClip.check_data(make_recipe(teacher=str(tiny_data.embeddings)), data)
    write_embeddings(tmp_path / "other", blobs((10,), 8, 2))
    for settings, message in (
        ({"with_replacement": False, "episode_samples": 120}, "120 is more than the 100 samples: lower it .*=true"),
        ({"teacher": str(tmp_path / "other")}, "was made of another index than data.index"),
        ({"teacher": str(tmp_path / "none")}, "run `mlcd embed"),
        (
            {"teacher": str(tiny_data.embeddings), "teacher_dim": dim + 1},
            f"of {dim}, objective.teacher_dim is {dim + 1}",
        ),
    ):
        with pytest.raises(UserError, match=message):
            ProtoClip.check_data(make_recipe(**settings), data)


def test_a_dry_run_tells_of_episodes(tiny_data: TinyData) -> None:
    data = TrainingData(ShardIndex(tiny_data.index), {})
    lines = ProtoClip.describe(make_recipe(teacher="some/where"), data, 2, 1)
    assert "5 of 4 steps, 96 samples drawn with replacement" in lines[0] and "external teacher some/where" in lines[1]


def test_a_plan_counts_heads_and_prototypes() -> None:
    run = PlannedRun(num_ranks=2, tensor_parallel=1, micro_batch=12, num_classes=0)
    small, large = (ProtoClip.need(make_recipe(num_clusters=count), run) for count in (10, 90))
    teacher = ProtoClip.need(make_recipe(num_clusters=90, teacher="x"), run)
    assert small.flops < large.flops < teacher.flops
    assert large.memory["prototypes"] == 4 * 90 * 128 * 4 < teacher.memory["prototypes"]
    assert small.memory["loss: during a step"] < large.memory["loss: during a step"]


def test_both_recipes_are_valid() -> None:
    paper, demo = load_recipe("protoclip_vit_b_32"), load_recipe("demo_protoclip")
    assert EpisodePlan.of(paper).num_episodes == 400 and EpisodePlan.of(demo).num_episodes == 43
    assert paper.optimizer.weight_decay == 0.5 and paper.train.global_batch == 512 and paper.text
    engine = ProtoClip.engine_module(paper)
    assert sum(parameter.numel() for parameter in engine.parameters()) == 2 * (512 * 2048 + 2 * 2048 + 2049 * 128) + 2


def test_sums_may_hold_it_beside_what_keeps_something_else() -> None:
    part = {"name": "protoclip", "episode_samples": 96, "num_clusters": 10}
    changed = {"name": "sum", "parts": [{"objective": part}, {"weight": 0.5, "objective": {"name": "mlcd"}}]}
    content = make_recipe().model_dump(mode="json") | {"objective": changed}
    assert parse_recipe(content, "here").objective.name == "sum"
    changed["parts"][1] = {"objective": {"name": "clip"}}
    with pytest.raises(UserError, match="protoclip and clip, which keep the same"):
        parse_recipe(content, "here")
