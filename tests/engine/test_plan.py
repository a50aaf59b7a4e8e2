"""The planner: its parts against counting by hand and against a real model, and what it says."""

from __future__ import annotations

import pytest
import torch

from mlcd_ds import plan
from mlcd_ds.config import load_recipe
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.memory import _kept_bytes, activation_bytes, state_bytes
from mlcd_ds.models.vit import ViT, ViTConfig, num_parameters

CONFIG = ViTConfig(image_size=32, patch_size=8, width=32, depth=5, heads=2, mlp_width=128, embed_dim=16)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("token_drop", [0.0, 0.5])
def test_activations_of_two_blocks_tell_those_of_five(recompute: str, token_drop: float) -> None:
    counted = _kept_bytes(CONFIG, recompute, token_drop)
    assert activation_bytes(CONFIG, "fp32", recompute, token_drop) == counted
    assert counted != activation_bytes(CONFIG.model_copy(update={"depth": 4}), "fp32", recompute, token_drop)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_activations_of_a_block_by_hand(precision: str, size: int, tensor_parallel: int) -> None:
    """One block more: two norms, q, k, v, the attention's output and its logsumexp, the sum, the MLP."""
    one, two = (
        activation_bytes(CONFIG.model_copy(update={"depth": depth}), precision, "none", 0.0, tensor_parallel)
        for depth in (1, 2)
    )
    tokens, width = 17, 32
    whole, split = 2 + 2, 3 + 1 + 2 * 4  # norms' inputs and outputs; q k v, attention's output, MLP before and after
    statistics = 2 * 2 * tokens + 2 * tokens  # mean and deviation of two norms; logsumexp of two heads
    expected = ((whole + split / tensor_parallel) * tokens * width + statistics) * size
    assert two - one == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("stage", "sharded"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_states_under_zero(stage: int, sharded: int) -> None:
    with torch.device("meta"):
        count = num_parameters(ViT(CONFIG))
    sizes = state_bytes(CONFIG, "bf16", Layout(8, 2, stage))
    whole = {"optimizer states": count // 2 * 12, "gradients": count // 2 * 2, "weights": count // 2 * 2}
    for number, (name, size) in enumerate(whole.items(), start=1):
        assert sizes[name] == (size // 4 if number <= sharded else size), name


def test_the_papers_job(capfd: pytest.CaptureFixture) -> None:
    assert plan.main(["--recipe", "vit_l_14", "--gpus", "80", "--gpu", "a100-80gb"]) == 0
    told = capfd.readouterr()
    text = told.out + told.err
    assert "batch 32800 = 80 x 5 x 82" in text and "80: fits" in text and "1250 sampled classes" in text
    assert "assumed" in text and "12.47 G images" in text
    assert "Clustering 400,000,000 x 768 into 1,000,000 centres" in text and "a pass 38 s" in text
    recipe, layout, gpu = load_recipe("vit_l_14"), Layout(80, 1, 1), plan.GPUS["a100-80gb"]
    flops = plan.training_flops(recipe, "none")
    assert flops == pytest.approx(486e9, rel=0.01)  # shared by everyone who counts ViT-L/14 at 224 px
    largest = plan.largest_micro_batch(recipe, layout, 10**6, gpu, "none")
    parts = plan.memory_gib(recipe, layout, 10**6, largest, "none")
    assert sum(parts.values()) <= 80 < sum(plan.memory_gib(recipe, layout, 10**6, 2 * largest, "none").values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "7"], "data.num_streams 160 is not a multiple of the 7 data-parallel ranks"),
        (["train.micro_batch_per_rank=81"], "train.micro_batch_per_rank 81 does not divide the 410 images"),
        (["head.parallel_size=7"], "head.parallel_size 7 must divide the 80 ranks"),
        (["--tensor-parallel", "3"], "tensor parallel size 3 does not divide the 80 ranks"),
        (["--tensor-parallel", "5"], "tensor parallel size 5 does not divide model.heads 16"),
    ],
)
def test_what_training_would_refuse_is_refused(
    capfd: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert plan.main(arguments) == 2
    assert message in "".join(capfd.readouterr())


def test_what_does_not_fit_is_said(capfd: pytest.CaptureFixture) -> None:
    assert plan.main(["--gpus", "8", "--gpu", "a100-40gb", "train.micro_batch_per_rank=null"]) == 0
    text = "".join(capfd.readouterr())
    assert "DOES NOT FIT" in text and "To make it fit" in text
