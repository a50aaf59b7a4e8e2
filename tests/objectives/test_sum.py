"""Sums of objectives: what their recipes say, and that losses and gradients are the parts', weighted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pair_runs import own_tokenizer, pair_recipe

from mlcd_ds.config import Recipe, load_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.base import PlannedRun
from mlcd_ds.objectives.registry import kind_of
from mlcd_ds.objectives.sum import Sum, parts_of

NCLIP = {"name": "nclip", "num_dims": 16, "head_width": 4}
PARTS = [{"weight": 2.0, "objective": {"name": "clip"}}, {"weight": 0.25, "objective": NCLIP}]


def make_recipe(objective: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    return pair_recipe(Path("runs/none"), "clip", own_tokenizer(), **{"objective": objective, **sections})


@pytest.fixture
def groups() -> Iterator[ParallelGroups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ParallelGroups(Group(dist.group.WORLD))  # type: ignore[arg-type]
    dist.destroy_process_group()


def test_losses_and_gradients_are_the_parts_weighted(groups: ParallelGroups) -> None:
    recipe, device = make_recipe({"name": "sum", "parts": PARTS}), torch.device("cpu")
    outputs = {name: torch.nn.functional.normalize(torch.randn(6, 20)) for name in ("image", "text")}
    with torch.no_grad():
        module = kind_of(recipe.objective).engine_module(recipe)
        assert module is not None
        outputs |= module(outputs)
    made = {}
    for each in (recipe, *(own for _, _, own in parts_of(recipe))):
        made[each.objective.name] = kind_of(each.objective)(each, SimpleNamespace(), groups, device)(outputs, {})  # type: ignore[arg-type]
    total, clip, nclip = made["sum"], made["clip"], made["nclip"]
    assert torch.allclose(total.loss, 2.0 * clip.loss + 0.25 * nclip.loss)
    assert total.gradients.keys() == clip.gradients.keys() | nclip.gradients.keys()
    for name, gradient in total.gradients.items():
        expected = torch.zeros_like(gradient)
        for factor, part in ((2.0, clip), (0.25, nclip)):
            expected += factor * part.gradients.get(name, torch.zeros(()))
        assert torch.allclose(gradient, expected), name
    assert total.parts["clip_image"] == 2.0 * clip.parts["image"] and "nclip_entropy" in total.parts
    assert torch.allclose(torch.stack(list(total.parts.values())).sum(), total.loss)


def test_what_a_part_keeps_itself_gets_its_weight_too(groups: ParallelGroups) -> None:
    recipe = make_recipe({"name": "sum", "parts": [PARTS[0], {"weight": 0.25, "objective": {"name": "mlcd"}}]})
    _, (_, _, own) = parts_of(recipe)
    data, device = SimpleNamespace(labels=SimpleNamespace(num_centers=9)), torch.device("cpu")
    outputs = {name: torch.nn.functional.normalize(torch.randn(6, 20)) for name in ("image", "text")}
    outputs["scale"] = torch.tensor(14.0)
    found = []
    for each, weight in ((recipe, 0.5), (own, 0.5)):
        objective = kind_of(each.objective)(each, data, groups, device)  # type: ignore[arg-type]
        objective.init_weights()
        objective.begin_step(0)
        objective(outputs, {"labels": torch.arange(12).view(6, 2) % 9}, weight)
        found.append((objective.parts[1] if isinstance(objective, Sum) else objective).head.grad_LE)
    assert found[1].abs().max() > 1e-3 and torch.allclose(found[0], 0.25 * found[1])


def test_what_a_sum_takes_is_what_its_parts_take() -> None:
    recipe = load_recipe("mlcd_clip_vit_b_32")
    kind = kind_of(recipe.objective)
    assert set(kind.towers_of(recipe)) == {"image", "text"} and set(kind.fields_of(recipe)) == {"labels", "tokens"}
    assert kind.sees_whole_batch(recipe) and kind.state_name(recipe) == "ClassCentres + Clip"
    run = PlannedRun(num_ranks=8, tensor_parallel=1, micro_batch=64, num_classes=1000)
    need, parts = kind.need(recipe, run), [kind.need(own, run) for _, kind, own in parts_of(recipe)]
    assert need.flops == sum(part.flops for part in parts) and need.sent == pytest.approx(sum(p.sent for p in parts))
    whole = PlannedRun(num_ranks=8, tensor_parallel=1, micro_batch=4096, num_classes=1000)
    parts = [kind.need(own, whole) for _, kind, own in parts_of(recipe)]
    assert sum(need.memory.values()) == sum(sum(part.memory.values()) for part in parts), (
        "the head sees all images, too"
    )
    both = load_recipe("xclip_vit_b_32")
    assert kind_of(both.objective).fields_of(both) == ("tokens",)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([*PARTS, {"objective": {"name": "siglip"}}], "has clip and siglip, which keep the same"),
        ([*PARTS, PARTS[1]], "has nclip and nclip, which keep the same"),
        (PARTS[:1], "objective.parts: .* at least 2"),
        ([PARTS[0], {"objective": {"name": "sum", "parts": PARTS}}], r"objective.parts.1.objective: .*'sum' found"),
        ([PARTS[0], {"weigth": 2, "objective": NCLIP}], r"objective.parts.1.weigth: .*Did you mean weight\?"),
        ([PARTS[0], {"weight": 0, "objective": NCLIP}], "objective.parts.1.weight: .*greater than 0"),
        (
            [PARTS[0], {"objective": {**NCLIP, "margin": 0.1}}],
            "objective.parts.1.objective.margin belongs to mlcd, .*; this recipe's objective is nclip",
        ),
        ([PARTS[0], {"objective": {**NCLIP, "num_dim": 3}}], r"parts.1.objective.num_dim: .*Did you mean num_dims"),
        ([PARTS[0], {"objective": {**NCLIP, "num_dims": 1}}], "parts.1.objective.num_dims: .*greater than or equal"),
    ],
)
def test_a_bad_sum_names_the_part_and_the_fix(parts: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_recipe({"name": "sum", "parts": parts})


def test_messages_name_a_parts_key_which_can_be_set() -> None:
    proto = {"objective": {"name": "protoclip", "episode_samples": 30, "num_clusters": 4}}
    parts = [{"objective": {"name": "mlcd"}}, proto]
    with pytest.raises(
        UserError, match=r"objective.parts.1.objective.episode_samples 30 .*set objective.parts.1.objec"
    ):
        make_recipe({"name": "sum", "parts": parts})
    key = "objective.parts.1.objective.num_dims"
    assert load_recipe("xclip_vit_b_32", (f"{key}=64",)).objective.parts[1].objective.num_dims == 64
    for wrong in ("objective.parts.2.objective.num_dims=64", "objective.parts.one=3"):
        with pytest.raises(UserError, match="is no place in a list of 2, counted from 0"):
            load_recipe("xclip_vit_b_32", (wrong,))


def test_a_part_whose_towers_are_frozen_is_refused() -> None:
    parts = [PARTS[0], {"objective": {"name": "mlcd"}}]
    with pytest.raises(UserError, match=r"objective.parts has mlcd, whose towers are all frozen.*towers.image=trained"):
        make_recipe({"name": "sum", "parts": parts}, towers={"image": "frozen"}, train={"init_from": "runs/x"})
    frozen = make_recipe({"name": "sum", "parts": PARTS}, towers={"image": "frozen"}, train={"init_from": "runs/x"})
    assert frozen.is_frozen("image"), "both parts train the text tower"


def test_sections_that_no_part_reads_are_refused() -> None:
    with pytest.raises(UserError, match=r"head.sample_rate belongs to mlcd.*; this recipe's objective is sum"):
        make_recipe({"name": "sum", "parts": PARTS}, head={"sample_rate": 0.5})
    parts = [PARTS[0], {"objective": {"name": "mlcd"}}]
    assert make_recipe({"name": "sum", "parts": parts}, head={"sample_rate": 0.5}).head.sample_rate == 0.5
