"""The whole pipeline through its real command lines: trained, exported, evaluated, and what it leaves to look at."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CPU_CONFIG, ROOT, mlcd
from distributed_harness import TinyData
from PIL import Image
from safetensors.torch import load_file
from shard_maker import encode, picture, write_tar

from mlcd_ds.config import load_recipe, recipe_names
from mlcd_ds.data.dali import EvaluationDecoder
from mlcd_ds.data.loader import shard_images
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.encoders.registry import load_encoder
from mlcd_ds.engine.weights import load_backbone, newest_checkpoint

STEPS = 6
RECIPE = f"""
description: a run for tests
model: {{image_size: 32, patch_size: 16, width: 32, depth: 2, heads: 2, mlp_width: 64, embed_dim: 16}}
data: {{num_streams: 4}}
objective: {{scale: 16.0}}
head: {{sample_rate: 0.5}}
optimizer: {{lr: 1.0e-3, warmup_steps: 2}}
train: {{steps: {STEPS}, global_batch: 16, precision: fp32, checkpoint_every: 4, log_every: 2}}
"""


@dataclass(frozen=True)
class Trained:
    """A finished tiny run, its export, and the arguments that trained it."""

    run: Path
    export: Path
    arguments: tuple[object, ...]


@pytest.fixture(scope="module")
def trained(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    data = (f"data.index={tiny_data.index}", f"data.labels={tiny_data.labels}", f"train.out={folder / 'run'}")
    arguments = ("--deepspeed_config", CPU_CONFIG, "--recipe", recipe, *data)
    mlcd("train", *arguments)
    mlcd("export", "--run", folder / "run", "--out", folder / "export")
    return Trained(folder / "run", folder / "export", arguments)


@pytest.mark.pipeline
def test_export_equals_our_backbone_in_transformers(trained: Trained, tiny_data: TinyData) -> None:
    import transformers

    ours = load_backbone(newest_checkpoint(trained.run))
    theirs, info = transformers.CLIPVisionModel.from_pretrained(trained.export, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    index = ShardIndex(tiny_data.index)
    images = next(iter(shard_images(index, 0, EvaluationDecoder(8, clip_pixels(32), torch.device("cpu"), 1))))
    with torch.inference_mode():
        expected, pooled = ours.forward_features(images), theirs.eval()(pixel_values=images).pooler_output
        projection = load_file(trained.export / "projection.safetensors")["projection.weight"]
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)  # measured 7e-7
        torch.testing.assert_close(pooled @ projection.T, ours(images), rtol=1e-5, atol=1e-5)
        flipped = theirs(pixel_values=images.flip(3)).pooler_output
    with pytest.raises(AssertionError):  # the comparison notices another input
        torch.testing.assert_close(flipped, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.pipeline
def test_the_exports_processor_prepares_images_as_our_evaluation_does(trained: Trained, tmp_path: Path) -> None:
    """The run's own pixels, the export's as we read it, and transformers' AutoImageProcessor, on images not square."""
    from transformers import AutoImageProcessor

    images = [picture(seed, *size) for seed, size in enumerate([(40, 70), (90, 33), (32, 32), (9, 20)])]
    members = [(f"{number}.png", encode(pixels, "PNG")) for number, pixels in enumerate(images)]
    mlcd("index", "--shards", write_tar(tmp_path / "0.tar", members), "--out", tmp_path / "index")
    run, export = (load_encoder(str(folder)) for folder in (trained.run, trained.export))
    processor = AutoImageProcessor.from_pretrained(trained.export, backend="pil")
    theirs = processor([Image.fromarray(pixels) for pixels in images], return_tensors="pt")["pixel_values"]
    level = 1 / np.mean(run.pixels.std)
    for encoder in (run, export):
        decoder = EvaluationDecoder(4, encoder.pixels, torch.device("cpu"), 1)
        ours = next(shard_images(ShardIndex(tmp_path / "index"), 0, decoder))
        assert float((ours - theirs).abs().mean((1, 2, 3)).max()) < 0.5 * level  # measured 0.13 levels
        assert float((ours.flip(1) - theirs).abs().mean()) > 10 * level  # swapped channels are noticed


@pytest.mark.pipeline
def test_evaluate_reports_and_refuses(trained: Trained, tiny_data: TinyData, tmp_path: Path) -> None:
    train_index, out = tmp_path / "train", tmp_path / "evaluation"
    mlcd("index", "--shards", ROOT / "demo/shards/train/00000.tar", "--out", train_index)
    arguments = ("--train-index", train_index, "--test-index", tiny_data.index, "--out", out)
    mlcd("evaluate", "--model", trained.export, *arguments, "--classes", ROOT / "demo/shards/classes.json")
    report = json.loads((out / "report.json").read_text())
    assert report["num_test"] == 100 and 0 <= report["linear_probe"] <= 1
    assert report["converged"] and len(report["linear_probe_by_split"]) == 5
    assert report["linear_probe_se"] >= report["linear_probe_test_se"] > 0
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "done already" in mlcd("evaluate", "--model", trained.export, *arguments)
    said = mlcd("evaluate", "--model", "pixels@8", *arguments, status=2)  # another model into the same folder
    assert "was made with pixels=" in said and "Traceback" not in said
    same = ("--train-index", train_index, "--test-index", train_index, "--out", tmp_path / "same")
    assert "same images" in mlcd("evaluate", "--model", "pixels@8", *same, status=2)
    said = mlcd("evaluate", "--model", "pixels@8", *arguments[:4], "--label-key", "caption", "--out", out, status=2)
    assert "caption" in said


@pytest.mark.pipeline
def test_tensorboard_and_metrics_answer_the_questions_of_a_run(trained: Trained) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.run / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "loss/total",
        "loss/negatives",
        "loss/positives",
        "optimizer/lr",
        "optimizer/grad_norm_backbone",
        "optimizer/grad_norm_head",
        "speed/images_per_s",
        "speed/data_wait_share",
        "memory/peak_mb",
    }
    assert "clusters/samples" in events.Tags()["images"]
    assert "clusters/images_per_center" in events.Tags()["histograms"]
    assert any(tag.startswith("config") for tag in events.Tags()["tensors"])
    entries = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        assert entry["loss/total"] == pytest.approx(entry["loss/negatives"] + entry["loss/positives"], rel=1e-6)
        assert entry["optimizer/grad_norm_backbone"] > 0 and entry["optimizer/grad_norm_head"] > 0


@pytest.mark.pipeline
def test_a_finished_run_is_not_trained_again_and_its_config_runs(trained: Trained, tmp_path: Path) -> None:
    before = (trained.run / "manifest.json").stat().st_mtime_ns
    assert "done already" in mlcd("train", *trained.arguments)
    assert (trained.run / "manifest.json").stat().st_mtime_ns == before
    arguments = ("--deepspeed_config", CPU_CONFIG, "--recipe", trained.run / "config.yaml", "--dry-run")
    assert "mlp_width: 64" in mlcd("train", *arguments, f"train.out={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


@pytest.mark.pipeline
def test_script_and_module_forms_are_the_same_program() -> None:
    """`deepspeed mlcd_ds/train.py` puts mlcd_ds/ on sys.path, where index.py, models/ and others would shadow."""
    by_path = subprocess.run(
        [sys.executable, "mlcd_ds/train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    by_module = subprocess.run(
        [sys.executable, "-m", "mlcd_ds", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert by_path.stdout == by_module.stdout and "--deepspeed_config" in by_path.stdout


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_passes_a_dry_run(name: str) -> None:
    is_demo = name.startswith("demo")
    config = "zero1_fp32_cpu.json" if is_demo else "zero1_bf16.json"
    overrides = ("data.index=null", "data.labels=null") if is_demo else ()
    said = mlcd("train", "--recipe", name, "--deepspeed_config", ROOT / "ds_configs" / config, "--dry-run", *overrides)
    recipe = load_recipe(name)
    assert "# backbone: " in said and f"out: {recipe.train.out}" in said
    assert ("# text tower: " in said) == (recipe.text is not None)
    assert ("forward, frozen" in said) == (name in ("lit_vit_l_14", "demo_lit"))


def test_the_main_recipe_is_the_papers() -> None:
    recipe = load_recipe("vit_l_14")
    assert recipe.train.global_batch == 80 * 410
    assert recipe.train.steps * recipe.train.global_batch == pytest.approx(32 * 389_737_314, rel=1e-5)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.optimizer.warmup_steps) == (1e-3, 0.2, 2000)
    assert (recipe.objective.margin, recipe.head.sample_rate, recipe.model.embed_dim) == (0.3, 0.1, 768)
    assert recipe.data.num_streams % 80 == 0


def test_untrained_and_pixel_encoders_have_their_dimensions() -> None:
    encoder = load_encoder("recipe:demo").to(torch.device("cpu"))
    images = torch.zeros(2, 3, encoder.pixels.image_size, encoder.pixels.image_size)
    assert encoder.encode(images).shape == (2, load_recipe("demo").model.width)
    assert load_encoder("pixels@4").encode(torch.zeros(2, 3, 4, 4)).shape == (2, 48)
    assert load_encoder("recipe:demo").fingerprint() == encoder.fingerprint() != load_encoder("pixels").fingerprint()
