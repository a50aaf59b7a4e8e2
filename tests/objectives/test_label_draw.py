"""Drawn labels: every real one equally often, by the image's key alone; and what becomes of them in the objective."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.config import parse_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.errors import UserError
from mlcd_ds.models.noise import uniforms
from mlcd_ds.objectives.class_centres import ClassCentres
from mlcd_ds.objectives.label_draw import STREAM, draw_labels

NUM_KEYS, NUM_CLASSES, DIM, GLOBAL_BATCH = 4000, 37, 8, 12


def make_keys(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2**32, (count,), generator=torch.Generator().manual_seed(seed))


def counts_of(drawn_Bp: Tensor) -> Tensor:
    return torch.bincount(drawn_Bp.flatten(), minlength=10)


def test_each_label_is_drawn_equally_often_and_in_its_order() -> None:
    labels_BP = torch.arange(10).expand(NUM_KEYS, -1)
    drawn_Bp = draw_labels(labels_BP, make_keys(NUM_KEYS), 8)
    assert drawn_Bp.shape == (NUM_KEYS, 8) and (drawn_Bp.diff(dim=1) > 0).all()
    # 3,200 of each, with a deviation of 25; measured 3,143 to 3,242.
    assert (counts_of(drawn_Bp) - 3200).abs().max() < 5 * 25
    assert (counts_of(labels_BP[:, :8]) - 3200).abs().max() > 5 * 25, "known-bad twin: the nearest eight"
    assert len(drawn_Bp.unique(dim=0)) == 45, "every pair of labels is left out at times"


def test_a_draw_belongs_to_the_image_and_the_epoch() -> None:
    labels_BP, keys_B = torch.arange(10).expand(50, -1), make_keys(50)
    drawn_Bp = draw_labels(labels_BP, keys_B, 4)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw_labels(labels_BP, keys_B[order], 4), drawn_Bp[order])
    parts = [draw_labels(*part, 4) for part in zip(labels_BP.split(7), keys_B.split(7), strict=True)]
    assert torch.equal(torch.cat(parts), drawn_Bp)
    assert (draw_labels(labels_BP, make_keys(50, seed=1), 4) != drawn_Bp).any(dim=1).float().mean() > 0.8, "next epoch"


def test_none_is_drawn_only_where_labels_are_few() -> None:
    labels_P = torch.tensor([-1, 3, 7, 3, -1, 9])  # three labels, one of them twice
    labels_BP, keys_B = labels_P.expand(NUM_KEYS, -1), make_keys(NUM_KEYS)
    for count in (1, 2, 3):
        drawn_Bp = draw_labels(labels_BP, keys_B, count)
        assert (drawn_Bp >= 0).all() and (count == 1 or (drawn_Bp.diff(dim=1) > 0).all())
        # A third of the draws each, of which 1,333 have a deviation of 30.
        assert (counts_of(drawn_Bp)[[3, 7, 9]] / count - NUM_KEYS / 3).abs().max() < 5 * 30
    for count in (4, 5, 6):
        drawn_Bp = draw_labels(labels_BP, keys_B, count)
        assert (drawn_Bp.sort(dim=1).values == torch.tensor([-1] * (count - 3) + [3, 7, 9])).all()
    places_Bp = uniforms(keys_B, STREAM, 6).argsort(dim=1)[:, :2]
    assert (labels_BP.gather(1, places_Bp) < 0).any(), "known-bad twin: places drawn whether they hold a label or not"
    assert (draw_labels(torch.full((5, 4), -1), keys_B[:5], 2) == -1).all()


RECIPE = {
    "description": "a test",
    "model": {
        "image_size": 32,
        "patch_size": 16,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "mlp_width": 64,
        "embed_dim": DIM,
    },
    "objective": {
        "name": "averaged_softmax",
        "scale": 16.0,
        "num_labels": 10,
        "drawn_labels": 4,
        "separate_samples": True,
        "similarity_filter": 0.4,
    },
    "head": {"sample_rate": 1.0, "init_std": 1.0},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"steps": 8, "global_batch": GLOBAL_BATCH},
    "data": {"num_streams": 6},
}


def learn(group: Group, num_micro_batches: int = 1, variant: str = "") -> dict[str, Tensor]:
    """Loss and gradients of a global batch of 12 images with 11 labels each, on this rank."""
    recipe, data = parse_recipe(RECIPE, "here"), SimpleNamespace(labels=SimpleNamespace(num_centers=NUM_CLASSES))
    objective = ClassCentres(recipe, data, ParallelGroups(group), torch.device("cpu"))
    objective.init_weights()
    objective.begin_step(3)
    generator = torch.Generator().manual_seed(4)
    emb_GE = torch.nn.functional.normalize(torch.randn(GLOBAL_BATCH, DIM, generator=generator), dim=1)
    labels_GP = torch.stack([torch.randperm(NUM_CLASSES, generator=generator)[:11] for _ in range(GLOBAL_BATCH)])
    labels_GP[::3, 2:] = -1
    keys_G = make_keys(GLOBAL_BATCH)
    emb_BE, labels_BP, keys_B = (tensor.chunk(group.size)[group.rank] for tensor in (emb_GE, labels_GP, keys_G))
    if variant == "keys of the rank":
        keys_B = keys_G[: len(keys_B)]
    elif variant == "ten labels":
        labels_BP = labels_BP[:, :10]
    elif variant == "the other ten labels":
        labels_BP = labels_BP[:, 1:]
    found, weight = [], 1.0 if variant == "not weighted" else 1 / num_micro_batches
    for emb, labels, keys in zip(*(part.chunk(num_micro_batches) for part in (emb_BE, labels_BP, keys_B)), strict=True):
        found.append(objective({"image": emb}, {"labels": labels, "keys": keys}, weight))
    return {
        "loss": torch.stack([given.loss for given in found]).mean(),
        "emb_grad": torch.cat([given.gradients["image"] for given in found]) / num_micro_batches,
        "weight_grad": objective.head.grad_LE,
    }


# Micro-batches and variant; of these the first equals the others only where it should.
SAME, OTHER = [(1, ""), (2, ""), (1, "ten labels")], [(2, "not weighted"), (1, "the other ten labels")]


def learn_all(group: Group) -> list[dict[str, Tensor]]:
    return [learn(group, *way) for way in [*SAME, *OTHER, (1, "keys of the rank")]]


@functools.cache
def learned(num_ranks: int) -> list[dict[str, Tensor]]:
    """Of each way, the results of all ranks."""
    ways = zip(*run_ranks(learn_all, num_ranks), strict=True)
    return [
        {"loss": ranks[0]["loss"]}
        | {key: torch.cat([rank[key] for rank in ranks]) for key in ("emb_grad", "weight_grad")}
        for ranks in ways
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_reference_loss_is_the_same_in_every_layout(num_ranks: int) -> None:
    expected, *same = learned(1)[0], *learned(num_ranks)
    for way, got in zip(SAME, same, strict=False):
        for key, tensor in got.items():
            if tensor is not expected[key]:
                assert_close(f"{way}: {key}", tensor, expected[key], 1.5e-6)  # measured 1.4e-7
    twins = learned(num_ranks)[len(SAME) : -1 if num_ranks == 1 else None]  # one rank's keys are all keys
    for way, got in zip([*OTHER, (1, "keys of the rank")], twins, strict=False):
        assert_differs(str(way), got["weight_grad"], expected["weight_grad"], 1.5e-6)


def test_more_drawn_labels_than_there_are_is_an_error_with_the_fix() -> None:
    recipe = parse_recipe({**RECIPE, "objective": {"drawn_labels": 9}}, "here")
    labels = SimpleNamespace(num_labels=8, folder="runs/labels")
    with pytest.raises(UserError, match=r"objective.drawn_labels is 9, but runs/labels holds 8 labels .*lower it"):
        ClassCentres.check_data(recipe, SimpleNamespace(labels=labels))
    ClassCentres.check_data(recipe, SimpleNamespace(labels=SimpleNamespace(num_labels=9)))
