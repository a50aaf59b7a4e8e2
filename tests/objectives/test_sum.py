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
from mlcd_ds.objectives.sum import parts_of

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
    assert total.parts["clip_image"] == clip.parts["image"] and "nclip_entropy" in total.parts


def test_what_a_sum_takes_is_what_its_parts_take() -> None:
    recipe = load_recipe("mlcd_clip_vit_b_32")
    kind = kind_of(recipe.objective)
    assert set(kind.towers_of(recipe)) == {"image", "text"} and set(kind.fields_of(recipe)) == {"labels", "tokens"}
    assert kind.sees_whole_batch(recipe) and kind.state_name(recipe) == "ClassCentres + Clip"
    run = PlannedRun(num_ranks=8, tensor_parallel=1, micro_batch=64, num_classes=1000)
    need, parts = kind.need(recipe, run), [kind.need(own, run) for _, kind, own in parts_of(recipe)]
    assert need.flops == sum(part.flops for part in parts) and need.sent == sum(part.sent for part in parts)
    assert sum(need.memory.values()) == sum(sum(part.memory.values()) for part in parts)
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


def test_sections_that_no_part_reads_are_refused() -> None:
    with pytest.raises(UserError, match=r"head.sample_rate belongs to mlcd.*; this recipe's objective is sum"):
        make_recipe({"name": "sum", "parts": PARTS}, head={"sample_rate": 0.5})
    parts = [PARTS[0], {"objective": {"name": "mlcd"}}]
    assert make_recipe({"name": "sum", "parts": parts}, head={"sample_rate": 0.5}).head.sample_rate == 0.5
