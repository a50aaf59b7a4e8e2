"""The planner: its parts against counting by hand and against a real model, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlcd_ds.config import load_recipe
from mlcd_ds.distributed.ds_config import ZeroBuffers, zero_buffers
from mlcd_ds.engine.activations import Activations, count_kept_bytes
from mlcd_ds.engine.hardware import GPUS
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.planned_towers import PlannedImage
from mlcd_ds.engine.run_memory import TrainingMemory, decoding_memory
from mlcd_ds.engine.run_time import Traffic, step_time, step_work, traffic
from mlcd_ds.models.tower import num_parameters
from mlcd_ds.models.vit import ViT, ViTConfig
from mlcd_ds.stages import plan

CONFIG = ViTConfig(image_size=32, patch_size=8, width=32, depth=5, heads=2, mlp_width=128, embed_dim=16)
TOWER = PlannedImage(CONFIG)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("token_drop", [0.0, 0.5])
def test_activations_of_two_blocks_tell_those_of_five(recompute: str, token_drop: float) -> None:
    tower = PlannedImage(CONFIG, token_drop=token_drop)
    counted = count_kept_bytes(tower, recompute)
    assert Activations(tower, "fp32", recompute).kept_bytes == counted
    assert counted != Activations(tower.of_depth(4), "fp32", recompute).kept_bytes


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_activations_of_a_block_by_hand(precision: str, size: int, tensor_parallel: int) -> None:
    """One block more: two norms, q, k, v, the attention's output and its logsumexp, the sum, the MLP."""
    one, two = (
        Activations(TOWER.of_depth(depth), precision, tensor_parallel=tensor_parallel).kept_bytes for depth in (1, 2)
    )
    tokens, width = 17, 32
    whole, split = 2 + 2, 3 + 1 + 2 * 4  # norms' inputs and outputs; q k v, attention's output, MLP before and after
    statistics = 2 * 2 * tokens + 2 * tokens  # mean and deviation of two norms; logsumexp of two heads
    expected = ((whole + split / tensor_parallel) * tokens * width + statistics) * size
    assert two - one == pytest.approx(expected, rel=0.01)


def test_what_the_backward_pass_adds() -> None:
    """Two gradients in the MLP; with recomputation what the block had left out, which is all but its input."""
    tokens, width = 17, 32
    mlp = 2 * 4 * tokens * width * 4
    assert Activations(TOWER, "fp32").backward_bytes == mlp
    plain, short = (Activations(TOWER, "fp32", recompute).kept_bytes for recompute in ("none", "block"))
    left_out = (plain - short) / CONFIG.depth
    assert Activations(TOWER, "fp32", "block").backward_bytes == pytest.approx(left_out + mlp, rel=1e-3)
    assert Activations(TOWER, "fp32", "mlp").backward_bytes < left_out + mlp
    assert Activations(TOWER, "fp32", tensor_parallel=2).backward_bytes == mlp // 2


# Bytes a parameter on 4 data-parallel ranks: weights, states, and gradients with their buckets or copies at the fullest
# moment, which is the optimizer's step or the end of the backward pass when there are no images.
STATES = [
    ("fp32", 0, False, 4, 8, 4 + 4),  # reduced in flat buckets
    ("bf16", 0, False, 4 + 2, 8, 4 + 4),  # autocast: weights in both
    ("fp16", 0, False, 2, 12, 2 + 4),
    ("bf16", 1, False, 2, 3, 0.5 + 0.5 + 1),  # of a rank's part: gradients, a copy, and one in fp32
    ("bf16", 1, True, 2, 3, 2 + 1),  # whole gradients between micro-batches
    ("bf16", 2, True, 2, 3, 0.5 + 0.5 + 1),
    ("fp32", 1, False, 4, 3, 1 + 2),
    ("bf16", 3, False, 0.5 + 2 + 2, 3, 0.5 + 1 + 1.5),  # gathered, and once more in the collective; the bucket stays
]


@pytest.mark.parametrize(("precision", "stage", "is_accumulated", "weights", "states", "gradients"), STATES)
def test_states_under_zero(
    precision: str, stage: int, is_accumulated: bool, weights: float, states: float, gradients: float
) -> None:
    with torch.device("meta"):
        count = num_parameters(ViT(CONFIG)) // 2
    elements = count if stage == 0 else count // 2
    memory = TrainingMemory([TOWER], precision, Layout(8, 2, stage), buffers=ZeroBuffers(elements, 10**9, 10**9))
    parts = memory.at_peak(0, 2 if is_accumulated else 1)
    assert parts["backbone: weights"] == pytest.approx(count * weights, rel=1e-3)
    assert parts["backbone: optimizer states"] == pytest.approx(count * states, rel=1e-3)
    others = sum(size for name, size in parts.items() if "gradients" in name)
    assert others == pytest.approx(count * gradients, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_average_of_the_weights_is_sharded_as_the_states_are(stage: int) -> None:
    memory = TrainingMemory([TOWER], "bf16", Layout(8, 2, stage), has_average=True)
    average = "backbone: average of the weights"
    parts = memory.at_peak(0)
    assert parts[average] * (2 if stage == 0 else 3) == parts["backbone: optimizer states"]
    assert average not in replace(memory, has_average=False).at_peak(0)


def test_what_stage_3_gathers_is_as_the_file_says(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    content = json.loads(Path("ds_configs/zero3_bf16.json").read_text())
    content["zero_optimization"] |= {"stage3_max_live_parameters": 10**8, "stage3_prefetch_bucket_size": 10**6}
    (tmp_path / "small.json").write_text(json.dumps(content))
    shown = []
    for path in (Path("ds_configs/zero3_bf16.json"), tmp_path / "small.json"):
        assert plan.main(["--deepspeed_config", str(path)]) == 0
        text = "".join(capfd.readouterr())
        shown.append(float(text.split("backbone: weights")[1].split()[0]))
    own = 304 * 10**6 / 80  # ViT-L/14's parameters
    assert shown[0] == pytest.approx((own + 304e6 + 50e6) * 2 / 2**30, rel=0.02)
    assert shown[1] == pytest.approx((own + 100e6 + 1e6) * 2 / 2**30, rel=0.05)
    content["zero_optimization"]["offload_param"] = {"device": "cpu"}
    (tmp_path / "small.json").write_text(json.dumps(content))
    assert plan.main(["--deepspeed_config", str(tmp_path / "small.json")]) == 2
    assert "offload_param" in "".join(capfd.readouterr())
    (tmp_path / "small.json").write_text('{"zero_optimization": 3}')
    assert plan.main(["--deepspeed_config", str(tmp_path / "small.json")]) == 2
    assert "zero_optimization must be a mapping" in "".join(capfd.readouterr())


def test_the_papers_job(capfd: pytest.CaptureFixture) -> None:
    assert plan.main(["--recipe", "vit_l_14", "--gpus", "80", "--gpu", "a100-80gb"]) == 0
    told = capfd.readouterr()
    text = told.out + told.err
    assert (
        "batch 32800 = 80 x 5 x 82" in text and "4.0 are to stay free: fits" in text and "1250 sampled classes" in text
    )
    assert "assumed" in text and "12.47 G images" in text
    assert "Clustering 400,000,000 x 768 into 1,000,000 centres" in text and "a pass 38 s" in text
    job = plan.Job(load_recipe("vit_l_14"), Layout(80, 1, 1), "a100-80gb", 10**6, ZeroBuffers(10**8))
    assert sum(part.flops for part in job.work(82, "none")) == pytest.approx(
        486e9, rel=0.01
    )  # as all count ViT-L/14 at 224 px
    largest = job.largest_micro_batch("none")
    taken = [sum(job.memory_gib(count, "none").values()) for count in (largest, 2 * largest)]
    assert taken[0] <= job.usable_gib == 76 < taken[1]


def test_what_fits_without_the_margin_does_not_fit() -> None:
    """39.66 GiB of 40 are none to start a run with."""
    recipe = load_recipe("vit_l_14")

    def job(count: int) -> plan.Job:
        train = recipe.train.model_copy(update={"global_batch": 80 * count, "micro_batch_per_rank": None})
        changed = recipe.model_copy(update={"train": train})
        return plan.Job(changed, Layout(80, 1, 1), "a100-40gb", 10**6, ZeroBuffers(10**8))

    def taken(count: int) -> float:
        return sum(job(count).memory_gib(count, "none").values())

    count = 100 + int((39.9 - taken(100)) / (taken(101) - taken(100)))
    close = job(count)
    assert close.usable_gib == 38 < taken(count) < 40
    assert close.largest_micro_batch("none") < count
    assert "DOES NOT FIT" in plan.page(close, None)


# Bytes of an element of a bucket that gradients fill: the bucket, and its copies when it is full.
IN_FP32 = [(1, 2, 4 + 2), (2, 2, 4 + 2), (3, 4, 4)]


@pytest.mark.parametrize(("stage", "bucket", "copies"), IN_FP32)
def test_gradients_that_travel_in_fp32_are_copied(tmp_path: Path, stage: int, bucket: int, copies: int) -> None:
    """A bucket when it is full, here after a quarter of the backward pass. With a small micro-batch that is the fullest
    moment."""
    with torch.device("meta"):
        count = num_parameters(ViT(CONFIG))
    size = count // 4
    section = {"stage": stage, "reduce_bucket_size": size, "overlap_comm": False}

    def memory(precision: str, dtype: str) -> TrainingMemory:
        config = {"zero_optimization": section, "communication_data_type": dtype}
        return TrainingMemory([TOWER], precision, Layout(4, 1, stage), buffers=zero_buffers(config, tmp_path))

    def activations(share: float) -> float:
        kept = Activations(TOWER, "bf16")
        return kept.kept_bytes * share + kept.backward_bytes + 3 * 32**2 * 4

    few, many = 1, 1000
    parts = memory("bf16", "fp32").at_peak(few)
    assert parts["buckets of gradients"] == size * (bucket + copies)
    assert parts["backbone: activations"] == pytest.approx(few * activations(3 / 4), rel=1e-3)
    for micro_batch in (few, many):
        in_fp32 = [sum(memory("fp32", dtype).at_peak(micro_batch).values()) for dtype in ("fp32", "bf16")]
        assert in_fp32[0] == in_fp32[1], "they are fp32 already"
    parts, short = (memory("bf16", dtype).at_peak(many) for dtype in ("fp32", "bf16"))
    assert parts["backbone: activations"] == short["backbone: activations"] == many * activations(1)
    assert parts["buckets of gradients"] - short["buckets of gradients"] == size * (bucket - 2), "not yet copied"


def test_decoding_takes_what_its_images_take() -> None:
    one = decoding_memory(1, 224)
    assert one == 2 * (2 * 3 * 10**6 + 2 * 3 * 224**2 + 4 * 3 * 224**2)  # two in flight; bytes, bytes, floats
    assert decoding_memory(82, 224) == 82 * one < decoding_memory(82, 336)


TRAFFIC = [
    # stage, tensor parallel, micro-batches: a parameter, in fp32; the ring's factor is 3/4
    (0, 1, 1, {"hidden": 0, "waited_for": 0.75 * 2 * 4}),
    (1, 1, 2, {"hidden": 0.75 * 2 * 4, "waited_for": 0.75 * 2}),
    (2, 1, 2, {"hidden": 0.75 * 2 * 4 * 2, "waited_for": 0.75 * 2}),
    (3, 1, 2, {"hidden": 0.75 * (4 * 2 + 2 * 2 * 2), "waited_for": 0}),
]


@pytest.mark.parametrize(("stage", "tensor_parallel", "num_micro_batches", "expected"), TRAFFIC)
def test_what_travels_in_a_step(
    stage: int, tensor_parallel: int, num_micro_batches: int, expected: dict[str, float]
) -> None:
    recipe = load_recipe("vit_l_14")
    work = step_work(recipe, "none", num_micro_batches)
    sent = traffic(recipe, Layout(4, tensor_parallel, stage), work, num_micro_batches, 10, 4, True)
    with torch.device("meta"):
        count = num_parameters(ViT(recipe.model))
    images, dim, labels = 40, 768, 8
    # Embeddings in bf16, their gradient in fp32, labels, and sums and cosines there and back.
    head = 0.75 * images * (dim * 2 + dim * 4 + labels * 8 + 2 * (1 + labels) * 4) * num_micro_batches
    assert sent.hidden == pytest.approx(expected["hidden"] * count)
    assert sent.waited_for == pytest.approx(expected["waited_for"] * count + head)
    assert sent.within_node == 0


def test_a_step_waits_for_what_computing_does_not_hide() -> None:
    gpu = GPUS["a100-80gb"]
    sent = Traffic(hidden=20e9, hiding_share=0.5, waited_for=2e9, within_node=24e9)
    time = step_time(1.0, sent, gpu, 16)
    assert (time.communication, time.exposed) == (pytest.approx(1 + 0.1 + 0.1), pytest.approx(0.5 + 0.2))
    assert step_time(1.0, sent, gpu, 16, between_gb=40).exposed == pytest.approx(0.05 + 0.1)
    assert step_time(1.0, sent, gpu, 8).exposed == pytest.approx((2 + 24) / 240), "within a node"


def test_tensor_parallel_sums_stay_within_a_node() -> None:
    recipe = load_recipe("vit_l_14")
    sent = traffic(recipe, Layout(8, 2, 1), step_work(recipe, "none", 1), 1, 10, 4, True)
    assert sent.within_node == 4 * 24 * 2 * 0.5 * 10 * 257 * 1024 * 2  # four sums a layer of tokens x width in bf16


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_a_file_of_ours_is_planned_as_its_stage(capfd: pytest.CaptureFixture, name: str) -> None:
    assert plan.main(["--deepspeed_config", f"ds_configs/{name}.json"]) == 0
    of_file = "".join(capfd.readouterr())
    assert plan.main(["--zero", name[4]]) == 0
    assert "".join(capfd.readouterr()) == of_file and f"ZeRO {name[4]}" in of_file
    assert plan.main(["--deepspeed_config", "ds_configs/tp2_zero1_bf16.json"]) == 0
    assert "ZeRO 1, tensor parallel 2" in "".join(capfd.readouterr())


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


@pytest.mark.parametrize("flag", ["--network", "--mfu"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_speeds_are_above_zero(capfd: pytest.CaptureFixture, flag: str, value: str) -> None:
    with pytest.raises(SystemExit):
        plan.main([f"{flag}={value}"])
    assert f"argument {flag}" in "".join(capfd.readouterr())


def test_what_does_not_fit_is_said(capfd: pytest.CaptureFixture) -> None:
    assert plan.main(["--gpus", "8", "--gpu", "a100-40gb", "train.micro_batch_per_rank=null"]) == 0
    text = "".join(capfd.readouterr())
    assert "DOES NOT FIT" in text and "To make it fit" in text


CLIP = """
description: as OpenAI's ViT-B/32
model: {image_size: 224, patch_size: 32, width: 768, depth: 12, heads: 12, mlp_width: 3072, embed_dim: 512}
text: {width: 512, depth: 12, heads: 8, mlp_width: 2048, embed_dim: 512}
objective: {name: clip}
data: {num_streams: 64}
optimizer: {lr: 5.0e-4, warmup_steps: 2000}
train: {steps: 390000, global_batch: 32768, micro_batch_per_rank: 512, init_from: somewhere}
"""


def shown(capfd: pytest.CaptureFixture, *arguments: str) -> dict[str, list[str]]:
    """The lines of a page, cut into words, by their first words."""
    assert plan.main(["--gpus", "32", "--gpu", "h100", *arguments]) == 0
    lines = "".join(capfd.readouterr()).splitlines()
    return {line[:32].strip(): line[32:].split() for line in lines if line.startswith(("  ", "Cluster"))}


def test_a_run_of_two_towers_is_shown_by_tower(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "clip.yaml"
    path.write_text(CLIP)
    page = shown(capfd, "--recipe", str(path))
    assert page["backbone, trained"] == ["87.8", "50", "8.82", "17.64", "8.82"]
    assert page["text tower, trained"] == ["63.4", "77", "5.89", "11.78", "5.89"]
    assert float(page["text tower: weights"][0]) == pytest.approx(63.4e6 * 2 / 2**30, abs=0.01)
    assert float(page["text tower: optimizer states"][0]) == pytest.approx(63.4e6 * 12 / 32 / 2**30, abs=0.01)
    assert float(page["micro-batches of the step"][0]) == pytest.approx(1024 * 3 * 224**2 * 2 / 2**30, rel=0.05)
    assert not any(name.startswith(("head", "Clustering")) for name in page), "nothing is clustered for it"
    at_once = shown(capfd, "--recipe", str(path), "train.micro_batch_per_rank=1024")
    assert at_once["text tower, trained"][-1] == "0.00" and "micro-batches of the step" not in at_once
    frozen = shown(capfd, "--recipe", str(path), "towers.image=frozen")
    assert frozen["backbone, frozen"] == ["87.8", "50", "8.82", "0.00", "0.00"]
    assert frozen["backbone: weights"] == page["backbone: weights"] and "backbone: optimizer states" not in frozen
    assert any(name.startswith("Clustering") for name in shown(capfd, "train.micro_batch_per_rank=41"))


def test_a_second_tower_costs_time(tmp_path: Path) -> None:
    path = tmp_path / "clip.yaml"
    path.write_text(CLIP)

    def computing(*overrides: str) -> float:
        recipe = load_recipe(str(path), overrides)
        return plan.Job(recipe, Layout(32, 1, 1), "h100", 10**6, ZeroBuffers()).time(0.5, None).computing

    image, text = 8.82e9, 5.89e9  # forward
    a_pair = 1024 / (0.5 * 989e12)
    assert computing() == pytest.approx(4 * (image + text) * a_pair, rel=1e-3)
    assert computing("train.micro_batch_per_rank=1024") == pytest.approx(3 * (image + text) * a_pair, rel=1e-3)
    assert computing("towers.image=frozen") == pytest.approx((image + 4 * text) * a_pair, rel=1e-3)
    assert computing("train.recompute=block") == pytest.approx(5 * (image + text) * a_pair, rel=1e-3)


def test_a_text_tower_that_ranks_cannot_share_is_refused(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "clip.yaml"
    path.write_text(CLIP.replace("heads: 8", "heads: 2"))
    assert plan.main(["--recipe", str(path), "--gpus", "32", "--tensor-parallel", "4"]) == 2
    assert "tensor parallel size 4 does not divide text.heads 2" in "".join(capfd.readouterr())
