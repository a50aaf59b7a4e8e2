"""Whole trainings through the real command lines: the same on any number of ranks, and as a plain loop computes it."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed_harness import TinyData, assert_close, assert_differs, quiet_environment
from torch import Tensor
from training_runs import DS_CONFIG, checkpoints, curves, final_weights, start, tiny_recipe, write_recipe

from mlcd_ds.data.fields import Labels, TrainingData
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.loader import AugmentConfig, StreamSlice, TrainLoader
from mlcd_ds.data.order import SampleOrder
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.heads.class_sampling import mixed_seed
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT, ViTConfig

pytestmark = pytest.mark.pipeline
# Launcher and ranks, ZeRO stage, overrides. test_layouts has every combination; here are the command lines.
RUNS = {
    "one rank": (("python", 1), 1, ()),
    "two ranks": (("deepspeed", 2), 1, ()),
    "three ranks": (("torchrun", 3), 1, ()),
    "micro-batches": (("python", 1), 1, ("train.micro_batch_per_rank=6",)),
    "two copies of the head": (("torchrun", 2), 1, ("head.parallel_size=1",)),
    "zero 2, two ranks, micro-batches": (("torchrun", 2), 2, ("train.micro_batch_per_rank=4",)),
    "zero 3, two ranks, micro-batches": (("torchrun", 2), 3, ("train.micro_batch_per_rank=4",)),
    "recomputed branches": (("python", 1), 1, ("train.recompute=mlp",)),
}
# Measured over the three comparisons, relative to the largest entry: curves 3.2e-7; weights (a moment's rounding over
# its root) 3.5e-6 on a Xeon, 2.3e-5 on an EPYC.
CURVE_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-4
# A bias on all keys alike leaves a softmax as it is: no gradient but rounding, which AdamW blows up.
WITHOUT_GRADIENT = "k_proj.bias"


@pytest.fixture(scope="module")
def finished(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of `RUNS`; each runs once."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder / "tiny.yaml", tiny_data.index, tiny_data.labels)

    @functools.cache
    def run(name: str) -> Path:
        launcher, stage, overrides = RUNS[name]
        ds_config = folder / f"zero{stage}.json"
        ds_config.write_text(json.dumps(json.loads(DS_CONFIG.read_text()) | {"zero_optimization": {"stage": stage}}))
        out = folder / name.replace(" ", "-").replace(",", "")
        training = start(recipe, out, *overrides, run=launcher, env=quiet_environment(), ds_config=ds_config)
        assert training.wait() == 0, training.text
        return training.out

    return run


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one rank"])
def test_ranks_and_micro_batches_do_not_change_the_training(finished: Callable[[str], Path], name: str) -> None:
    expected, got = finished("one rank"), finished(name)
    assert curves(expected).shape == (8, 5)
    for column in range(5):
        assert_close(f"curve {column}", curves(got)[:, column], curves(expected)[:, column], CURVE_TOLERANCE)
    weights, expected_weights = final_weights(got), final_weights(expected)
    assert weights.keys() == expected_weights.keys()
    for key, expected_weight in expected_weights.items():
        if expected_weight.any() and not key.endswith(WITHOUT_GRADIENT):
            assert_close(key, weights[key], expected_weight, WEIGHT_TOLERANCE)


def test_the_other_loss_optimizer_and_sample_train(tiny_data: TinyData, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_data.index, tiny_data.labels)
    overrides = ("objective.name=unicom", "head.optimizer=sgd", "head.update=dense")
    overrides = (*overrides, "head.sampling=partial_fc", "head.sample_rate=0.5", "optimizer.head_clip_norm=9")
    overrides = (*overrides, "objective.feature_rate=0.75", "optimizer.lr=4e-3", "train.steps=40")
    quiet = ("train.drop_path=0", "train.token_drop=0", "data.augment.color_jitter=0")
    training = start(recipe, tmp_path / "run", *overrides, *quiet, run=("torchrun", 2), env=quiet_environment())
    assert training.wait() == 0, training.text
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss/joint"] for entry in entries]
    assert len(losses) == 40 and losses == [entry["loss/total"] for entry in entries]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_successors_loss_trains(tiny_data: TinyData, tmp_path: Path) -> None:
    """As the recipe onevision_vit_l_14 has it, with four labels instead of ten."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_data.index, tiny_data.labels)
    loss = "{name: averaged_softmax, scale: 16, drawn_labels: 2, similarity_filter: 0.75, separate_samples: true}"
    overrides = (f"objective={loss}", "head.sampling=partial_fc", "head.sample_rate=0.5", "head.update=dense")
    overrides = (*overrides, "optimizer.lr=4e-3", "optimizer.head_clip_norm=9", "train.steps=24")
    quiet = ("train.drop_path=0", "train.token_drop=0", "data.augment.color_jitter=0")
    training = start(recipe, tmp_path / "run", *overrides, *quiet, run=("torchrun", 2), env=quiet_environment())
    assert training.wait() == 0, training.text
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss/softmax"] for entry in entries]
    assert len(losses) == 24 and losses == [entry["loss/total"] for entry in entries]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_run_starts_from_an_export(tiny_data: TinyData, finished: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlcd_ds", "export", "--run", str(finished("one rank")), "--out", "export"]
    subprocess.run(command, cwd=tmp_path, env=quiet_environment(), check=True)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_data.index, tiny_data.labels)
    overrides = ("--init-from", str(tmp_path / "export"), "train.steps=3", "optimizer.lr=1e-9")
    training = start(recipe, tmp_path / "again", *overrides, env=quiet_environment())
    assert training.wait() == 0, training.text
    before, after = final_weights(finished("one rank")), final_weights(tmp_path / "again")
    assert not torch.equal(after["head.weight"], before["head.weight"]), "the head starts anew"
    backbone = {name: weight for name, weight in before.items() if not name.startswith("head.")}
    assert len(backbone) > 20
    for name, weight in backbone.items():
        assert torch.allclose(after[name], weight, atol=1e-6), name
    assert f"train: starts from {tmp_path}/export; the backbone\n" in training.text


def test_more_labels_than_there_are_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_data.index, tiny_data.labels)
    training = start(recipe, tmp_path / "run", "objective.num_labels=5", env=quiet_environment())
    assert training.wait() != 0
    assert "objective.num_labels is 5" in training.text and "holds 4 labels" in training.text
    assert "Traceback" not in training.text


def test_a_run_learns_and_tells_what_it_did(finished: Callable[[str], Path]) -> None:
    out = finished("two ranks")
    losses = curves(out)[:, 0]
    assert losses[-1] < 0.8 * losses[0]
    newest = checkpoints(out)[-1]
    assert newest.name == "step_00000008" and len(list(newest.glob("head-*"))) == 2
    assert (out / "config.yaml").exists() and (out / "manifest.json").exists() and (out / "tensorboard").is_dir()


def plain_loop(data: TinyData, num_steps: int, lr: float, head_clip_norm: float, dtype: torch.dtype) -> Tensor:
    """The recipe's training without DeepSpeed, shards or our head: [steps, 5] as `curves`."""
    recipe = tiny_recipe(data.index, data.labels)
    settings, steps, seed = recipe["optimizer"], recipe["train"]["steps"], recipe["train"]["seed"]
    index = ShardIndex(data.index)
    labels = LabelStore(data.labels, index)
    order = SampleOrder(index.counts, recipe["data"]["num_streams"], recipe["data"]["shuffle_window"], seed)
    part = StreamSlice(tuple(range(6)), 4, 1)
    augment = AugmentConfig(**recipe["data"]["augment"])
    loader = TrainLoader(
        TrainingData(index, {"labels": Labels(labels)}), order, part, clip_pixels(32), augment, torch.device("cpu"), 1
    )
    backbone = ViT(ViTConfig(**recipe["model"]))
    backbone.init_weights(torch.Generator().manual_seed(seed))
    backbone.to(dtype)
    rows = torch.randn(4096, 16, generator=torch.Generator().manual_seed(mixed_seed(seed, -1, 0)))
    centers_CE = (rows[: labels.num_centers] * 0.1).to(dtype).requires_grad_()
    matrices = [p for n, p in backbone.named_parameters() if p.ndim > 1 and "position" not in n]
    vectors = [p for n, p in backbone.named_parameters() if p.ndim == 1 or "position" in n]
    groups = [{"params": [*matrices, centers_CE], "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
    entries = []
    batches = loader.batches(0)
    for step in range(num_steps):
        batch = next(batches)
        noise = TrainingNoise(batch.keys_B, recipe["train"]["drop_path"], recipe["train"]["token_drop"])
        emb_BE = F.normalize(backbone(batch.images_B3SS.to(dtype), noise))
        negative, positive = dense_terms(emb_BE, centers_CE, batch.fields["labels"])
        (negative + positive).backward()
        norm = torch.nn.utils.clip_grad_norm_(backbone.parameters(), settings["clip_norm"])
        head_norm = torch.nn.utils.clip_grad_norm_([centers_CE], head_clip_norm)
        rate = lr * (step + 1) / 2 if step < 2 else lr * 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 3)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        entries.append([value.item() for value in (negative + positive, negative, positive, norm, head_norm)])
    batches.close()
    loader.close()
    return torch.tensor(entries, dtype=torch.float64)


def dense_terms(emb_BE: Tensor, centers_CE: Tensor, labels_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the batch of log(1 + sum e^z) over the negatives and of log(1 + sum e^-z) over the positives."""
    cosines_BC = emb_BE @ F.normalize(centers_CE).T
    own_BC = torch.zeros_like(cosines_BC, dtype=torch.bool).scatter(1, labels_BP, True)
    negative_B = torch.log1p(torch.exp(16 * cosines_BC).masked_fill(own_BC, 0).sum(dim=1))
    positive_B = torch.log1p(torch.exp(-16 * (cosines_BC - 0.3)).masked_fill(~own_BC, 0).sum(dim=1))
    return negative_B.mean(), positive_B.mean()


def test_the_training_is_what_a_plain_loop_computes(tiny_data: TinyData, finished: Callable[[str], Path]) -> None:
    got = curves(finished("one rank"))[:6]
    expected = plain_loop(tiny_data, 6, 1e-3, 0.1, torch.float64)
    # fp32 against float64: measured 4.1e-7.
    for column in range(5):
        assert_close(f"curve {column}", got[:, column], expected[:, column], CURVE_TOLERANCE)
    other_rate = plain_loop(tiny_data, 6, 1.001e-3, 0.1, torch.float64)
    assert_differs("learning rate off by a thousandth", got[:, 0], other_rate[:, 0], CURVE_TOLERANCE)
    loose = plain_loop(tiny_data, 6, 1e-3, 5.0, torch.float64)  # AdamW hardly sees a factor on all gradients
    assert_differs("head clipped at another norm", got[:, 3], loose[:, 3], CURVE_TOLERANCE)
