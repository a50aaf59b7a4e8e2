"""What planner and log say of two towers, frozen ones, and batches seen as a whole: against counting by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.distributed.ds_config import ZeroBuffers
from mlcd_ds.engine.activations import Activations, count_kept_bytes
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.phases import phase_at
from mlcd_ds.engine.planned_towers import PlannedImage, PlannedText, PlannedTower, model_flops, planned_towers
from mlcd_ds.engine.run_memory import TrainingMemory
from mlcd_ds.engine.run_time import step_work, traffic
from mlcd_ds.models import layers
from mlcd_ds.models.text import TextConfig
from mlcd_ds.models.vit import ViTConfig

IMAGE = ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2, mlp_width=256, embed_dim=16)
TEXT = TextConfig(vocab_size=500, context=12, width=32, depth=5, heads=2, mlp_width=128, embed_dim=16, end_token=9)
# Of an image of 17 tokens, and a text of 12.
IMAGE_FLOPS = 2 * 16 * 192 * 64 + 2 * (8 * 17 * 64**2 + 4 * 17**2 * 64 + 4 * 17 * 64 * 256) + 2 * 64 * 16
TEXT_FLOPS = 5 * (8 * 12 * 32**2 + 2 * 12 * 13 * 32 + 4 * 12 * 32 * 128) + 2 * 32 * 16


def block_parameters(width: int, mlp_width: int) -> int:
    return 4 * (width**2 + width) + 2 * width * mlp_width + mlp_width + width + 4 * width


IMAGE_PARAMETERS = 64 * (192 + 1 + 17) + 2 * block_parameters(64, 256) + 4 * 64 + 64 * 16
LOOKED_UP = 500 * 32
TEXT_PARAMETERS = LOOKED_UP + 12 * 32 + 5 * block_parameters(32, 128) + 2 * 32 + 32 * 16


def make_recipe(objective: str = "clip", frozen: Iterable[str] = (), **train: Any) -> Recipe:
    content: dict[str, Any] = {
        "description": "two small towers",
        "model": IMAGE.model_dump(),
        "objective": {"name": objective},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 10, "global_batch": 48, "precision": "bf16", "token_drop": 0.0} | train,
        "towers": {name: "frozen" for name in frozen},
    }
    if objective != "mlcd":
        content["text"] = TEXT.model_dump()
    if frozen:
        content["train"]["init_from"] = "somewhere"
    return parse_recipe(content, "test")


def towers_of(recipe: Recipe) -> tuple[PlannedTower, ...]:
    return planned_towers(recipe, phase_at(recipe, 0))


# Parameters and operations.


def test_parameters_of_both_towers_by_hand() -> None:
    image, text = towers_of(make_recipe())
    assert (image.num_parameters, text.num_parameters) == (IMAGE_PARAMETERS, TEXT_PARAMETERS)
    assert image.num_on_rank(2) == IMAGE_PARAMETERS // 2
    assert text.num_on_rank(2) == LOOKED_UP + (TEXT_PARAMETERS - LOOKED_UP) // 2, "the vocabulary is on each rank"
    assert [tower.label for tower in towers_of(make_recipe("mlcd"))] == ["backbone"]


@pytest.mark.parametrize(
    ("objective", "frozen", "expected"),
    [
        ("mlcd", (), 3 * IMAGE_FLOPS),
        ("clip", (), 3 * IMAGE_FLOPS + 3 * TEXT_FLOPS),
        ("clip", ("image",), IMAGE_FLOPS + 3 * TEXT_FLOPS),
        ("siglip", ("text",), 3 * IMAGE_FLOPS + TEXT_FLOPS),
    ],
)
def test_operations_of_the_model_by_hand(objective: str, frozen: tuple[str, ...], expected: int) -> None:
    """Those of which an MFU is the share: no more where a batch is seen as a whole, or blocks are computed again."""
    recipe = make_recipe(objective, frozen, micro_batch_per_rank=4, recompute="block")
    assert model_flops(recipe, phase_at(recipe, 0)) == expected
    assert model_flops(make_recipe(), phase_at(recipe, 0)) != IMAGE_FLOPS + 3 * TEXT_FLOPS, "known-bad: none is frozen"


def test_a_step_is_planned_with_all_that_it_computes() -> None:
    """Once more forward, of trained towers, where the objective sees several micro-batches at once."""

    def flops(recipe: Recipe, num_micro_batches: int, recompute: Any = "none") -> list[float]:
        return [part.flops for part in step_work(recipe, recompute, num_micro_batches)]

    clip, lit = make_recipe(), make_recipe(frozen=["image"])
    assert flops(clip, 1) == [3 * IMAGE_FLOPS, 3 * TEXT_FLOPS]
    assert flops(clip, 2) == [4 * IMAGE_FLOPS, 4 * TEXT_FLOPS]
    assert flops(clip, 2, "block") == [5 * IMAGE_FLOPS, 5 * TEXT_FLOPS]
    assert flops(clip, 1, "mlp") == [3 * IMAGE_FLOPS + 2 * 4 * 17 * 64 * 256, 3 * TEXT_FLOPS + 5 * 4 * 12 * 32 * 128]
    assert flops(lit, 1, "block") == [IMAGE_FLOPS, 4 * TEXT_FLOPS]
    assert flops(lit, 3) == [IMAGE_FLOPS, 4 * TEXT_FLOPS]
    assert flops(make_recipe("mlcd"), 3) == [3 * IMAGE_FLOPS], "its objective takes one micro-batch after the other"
    image, text = step_work(lit, "none", 1)
    assert image.flops_on_rank(2) == IMAGE_FLOPS, "frozen towers are not split"
    assert text.flops_on_rank(2) == 1.5 * TEXT_FLOPS


def test_a_frozen_tower_sees_all_of_each_phases_images() -> None:
    phases = [{"until": 5, "image_size": 16, "token_drop": 0.5}]
    trained, frozen = (make_recipe(frozen=names, phases=phases) for names in ((), ["image"]))
    assert towers_of(trained)[0].tokens == 1 + 2 and towers_of(frozen)[0].tokens == 1 + 4
    (image, text) = step_work(frozen, "none", 1)
    assert (image.tokens, text.tokens) == ((5 + 17) / 2, 12)


# Memory.


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_activations_of_two_blocks_of_text_tell_those_of_five(recompute: Any) -> None:
    tower = PlannedText(TEXT)
    counted = count_kept_bytes(tower, recompute)
    assert Activations(tower, "fp32", recompute).kept_bytes == counted
    assert counted != Activations(tower.of_depth(4), "fp32", recompute).kept_bytes


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_activations_of_a_block_of_text_by_hand(precision: str, size: int, tensor_parallel: int) -> None:
    one, two = (
        Activations(PlannedText(TEXT).of_depth(depth), precision, tensor_parallel=tensor_parallel).kept_bytes
        for depth in (1, 2)
    )
    whole, split = 2 + 2, 3 + 1 + 2 * 4  # as an image's block: norms; q k v, attention's output, MLP before and after
    expected = ((whole + split / tensor_parallel) * 12 * 32 + 2 * 2 * 12 + 2 * 12) * size
    assert two - one == pytest.approx(expected, rel=0.01)


def kept_by_context(context: int) -> int:
    config = TEXT.model_copy(update={"context": context, "depth": 1})
    return count_kept_bytes.__wrapped__(PlannedText(config), "none")


def test_no_matrix_of_tokens_by_tokens_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def bend() -> int:
        kept = [kept_by_context(context) for context in (64, 128, 192)]
        return kept[2] - 2 * kept[1] + kept[0]

    assert bend() == 0

    def written_out(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        logits = q @ k.transpose(2, 3)
        return logits.softmax(dim=-1) @ v

    monkeypatch.setattr(layers, "attend", written_out)  # the known-bad twin
    assert bend() >= 2 * 64**2 * 2 * 4


def peak_bytes(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Of a forward pass without gradient, by torch's allocator."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(*inputs)
    events = [event for event in flat(record.profiler.kineto_results.experimental_event_tree()) if is_allocation(event)]
    total = largest = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        total += event.extra_fields.alloc_size
        largest = max(largest, total)
    return largest


def flat(events: list) -> list:
    return [*events, *(inner for event in events for inner in flat(event.children))]


def is_allocation(event: Any) -> bool:
    return event.tag == torch._C._profiler._EventType.Allocation


@pytest.mark.parametrize("tower", [PlannedImage(IMAGE), PlannedText(TEXT)], ids=["image", "text"])
def test_what_a_frozen_tower_takes_is_what_its_forward_pass_takes(tower: PlannedTower) -> None:
    batch = 64
    measured = peak_bytes(tower.build(), tower.zeros(batch)[:1])
    assert measured == pytest.approx(batch * Activations(tower, "fp32").inference_bytes, rel=0.05)
    assert measured < 0.6 * batch * Activations(tower, "fp32").kept_bytes, "known-bad: as if it were trained"


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_frozen_tower_has_weights_alone_and_whole(precision: str, size: int, stage: int) -> None:
    towers, layout = towers_of(make_recipe(frozen=["image"])), Layout(8, 2, stage)
    parts = TrainingMemory(towers, precision, layout, has_average=True).at_peak(4)
    own = {name: amount for name, amount in parts.items() if name.startswith("backbone")}
    assert own.pop("backbone: weights") == IMAGE_PARAMETERS * size
    assert set(own) <= {"backbone: activations"}
    other = TrainingMemory(towers_of(make_recipe()), precision, layout).at_peak(4)
    assert "backbone: optimizer states" in other and other["backbone: weights"] != IMAGE_PARAMETERS * size


def test_states_of_two_towers_by_hand() -> None:
    """bf16 at stage 1 on 4 data-parallel pairs of ranks; autocast at stage 0 leaves the vocabulary as it is."""
    towers = towers_of(make_recipe())
    count = LOOKED_UP + (TEXT_PARAMETERS - LOOKED_UP) // 2
    parts = TrainingMemory(towers, "bf16", Layout(8, 2, 1)).at_peak(0)
    assert parts["text tower: weights"] == 2 * count
    assert parts["text tower: optimizer states"] == 12 * (count // 4)
    assert parts["text tower: gradients"] == 2 * (count // 4)
    assert parts["backbone: weights"] == 2 * (IMAGE_PARAMETERS // 2)
    parts = TrainingMemory(towers, "bf16", Layout(8, 2, 0)).at_peak(0)
    assert parts["text tower: weights"] == 4 * count + 2 * (count - LOOKED_UP)
    parts = TrainingMemory(towers, "fp32", Layout(2, 1, 3), buffers=ZeroBuffers(0, 10**9, 1000)).at_peak(0)
    both = IMAGE_PARAMETERS + TEXT_PARAMETERS
    gathered = parts["backbone: weights"] + parts["text tower: weights"] - 4 * both // 2
    assert gathered == pytest.approx(4 * (both + 1000), abs=16)


def test_activations_of_both_towers_are_there_at_once() -> None:
    """As the text tower's backward pass begins, which ran last."""
    towers = towers_of(make_recipe())
    image, text = (Activations(tower, "fp32") for tower in towers)
    parts = TrainingMemory(towers, "fp32", Layout(1)).at_peak(1000)
    assert parts["backbone: activations"] == 1000 * (image.kept_bytes + 4 * 3 * 32**2)
    assert parts["text tower: activations"] == 1000 * (text.kept_bytes + text.backward_bytes + 8 * 12)
    # Of a larger image tower the own backward pass is the fullest moment: the text's activations are gone by then.
    towers = PlannedImage(IMAGE.model_copy(update={"mlp_width": 4096})), PlannedText(TEXT)
    image, text = (Activations(tower, "fp32") for tower in towers)
    assert image.backward_bytes > text.kept_bytes + text.backward_bytes
    parts = TrainingMemory(towers, "fp32", Layout(1)).at_peak(1000)
    assert parts["backbone: activations"] == 1000 * (image.kept_bytes + image.backward_bytes + 4 * 3 * 32**2)
    assert parts["text tower: activations"] == 1000 * 8 * 12


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp16", 2)])
def test_what_is_held_of_a_batch_that_is_seen_as_a_whole(precision: str, width: int) -> None:
    held = "micro-batches of the step"
    clip = TrainingMemory(towers_of(make_recipe()), precision, Layout(2), needs_whole_batch=True)
    assert clip.at_peak(8, 3)[held] == 24 * (3 * 32**2 * width + 8 * 12 + 2 * 2 * 16 * 4)
    lit = replace(clip, towers=towers_of(make_recipe(frozen=["image"])))
    assert lit.at_peak(8, 3)[held] == 24 * (8 * 12 + (1 + 2) * 16 * 4), "frozen towers run once"
    assert held not in clip.at_peak(24) and held not in replace(clip, needs_whole_batch=False).at_peak(8, 3)


def test_a_frozen_towers_pass_comes_beside_what_is_kept_unless_it_comes_before() -> None:
    towers = towers_of(make_recipe(frozen=["image"]))
    passing, kept = Activations(towers[0], "fp32").inference_bytes, Activations(towers[1], "fp32")
    assert passing > kept.backward_bytes
    memory = TrainingMemory(towers, "fp32", Layout(1), needs_whole_batch=True)
    inputs = 4 * 3 * 32**2, 8 * 12
    parts = memory.at_peak(1000)
    assert parts["backbone: activations"] == 1000 * (passing + inputs[0])
    assert parts["text tower: activations"] == 1000 * (kept.kept_bytes + inputs[1])
    parts = memory.at_peak(1000, 2)
    assert passing < kept.kept_bytes + kept.backward_bytes
    assert parts["backbone: activations"] == 1000 * inputs[0]
    assert parts["text tower: activations"] == 1000 * (kept.kept_bytes + kept.backward_bytes + inputs[1])


# What travels.


def test_what_travels_of_two_towers() -> None:
    """On two data-parallel pairs of ranks in bf16, stage 3: a half of the ring, and a half of each sum of a pair."""
    layout, micro_batch, num = Layout(4, 2, 3), 6, 4
    count = IMAGE_PARAMETERS // 2 + LOOKED_UP + (TEXT_PARAMETERS - LOOKED_UP) // 2

    def sent(recipe: Recipe, num_micro_batches: int) -> Any:
        work = step_work(recipe, "none", num_micro_batches)
        return traffic(recipe, layout, work, num_micro_batches, micro_batch, 4, True)

    clip = make_recipe()
    # Gradients once; weights for two forward passes and backward.
    assert sent(clip, num).hidden == pytest.approx(num * 0.5 * count * (4 + 3 * 2))
    assert sent(clip, 1).hidden == pytest.approx(0.5 * count * (4 + 2 * 2))
    sums = 2 * (17 * 64 * 2 + 12 * 32 * 5) * 2  # two a block and pass, of tokens x width in bf16
    assert sent(clip, num).within_node == pytest.approx(num * micro_batch * 3 * sums)
    assert sent(clip, 1).within_node == pytest.approx(micro_batch * 2 * sums)
    text = LOOKED_UP + (TEXT_PARAMETERS - LOOKED_UP) // 2
    lit = make_recipe(frozen=["image"])
    assert sent(lit, 1).hidden == pytest.approx(0.5 * text * (4 + 2 * 2)), "of trained towers only"
    assert sent(lit, 1).within_node == pytest.approx(micro_batch * 2 * 2 * 12 * 32 * 5 * 2)


def test_gradients_travel_beside_the_backward_pass() -> None:
    def share(recipe: Recipe, num_micro_batches: int, size: int = 1) -> float:
        work = step_work(recipe, "none", num_micro_batches)
        return traffic(recipe, Layout(2 * size, size, 2), work, num_micro_batches, 2, 4, True).hiding_share

    lit = make_recipe(frozen=["image"])
    assert share(make_recipe("mlcd"), 3) == pytest.approx(2 / 3)
    assert share(make_recipe(), 1) == pytest.approx(2 / 3) and share(make_recipe(), 2) == pytest.approx(2 / 4)
    assert share(lit, 1) == pytest.approx(2 * TEXT_FLOPS / (IMAGE_FLOPS + 3 * TEXT_FLOPS))
    assert share(lit, 1, 2) == pytest.approx(TEXT_FLOPS / (IMAGE_FLOPS + 1.5 * TEXT_FLOPS))
