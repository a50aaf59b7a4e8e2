"""The sharded head: initial centres, accumulation, clipping, and its state on disk for other numbers of ranks."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError
from mlcd_ds.heads.groups import HeadGroups, make_head_groups
from mlcd_ds.heads.head_state import load_head, save_head
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead, without_repeats
from mlcd_ds.heads.row_optimizer import RowOptimizer
from mlcd_ds.objectives.class_centres import head_optimizer
from mlcd_ds.objectives.class_losses import ClassLoss, ClassLossConfig
from mlcd_ds.recipes.sections import OptimizerConfig

NUM_CLASSES, DIM, GLOBAL_BATCH, NUM_LABELS = 37, 8, 18, 3
MANY_CLASSES = 9001  # more than two blocks of initial centres
RANK_COUNTS = (1, 2, 3)


def make_head(
    group: Group,
    rate: float = 1.0,
    num_classes: int = NUM_CLASSES,
    sampling: str = "uniform",
    is_apart: bool = False,
) -> PartialFCHead:
    """`is_apart`: with a sample for each label."""
    config = HeadConfig(sample_rate=rate, sampling=sampling, init_std=0.1)
    name = "averaged_softmax" if is_apart else "mlcd"
    loss = ClassLoss(ClassLossConfig(name=name, scale=16.0, separate_samples=is_apart))
    head = PartialFCHead(num_classes, DIM, config, loss, make_head_groups(group), seed=3)
    head.init_weights()
    return head


def make_batch(number: int, group: Group) -> tuple[Tensor, Tensor]:
    """This rank's part of a global batch."""
    generator = torch.Generator().manual_seed(number)
    emb_GE = torch.nn.functional.normalize(torch.randn(GLOBAL_BATCH, DIM, generator=generator), dim=1)
    labels_GP = torch.randint(NUM_CLASSES, (GLOBAL_BATCH, NUM_LABELS), generator=generator)
    return emb_GE.tensor_split(group.size)[group.rank], labels_GP.tensor_split(group.size)[group.rank]


def run_head(group: Group, folder: Path) -> dict[str, object]:
    """Everything that one launch can show; writes the head's state to `folder`/R."""
    initial = make_head(group, num_classes=MANY_CLASSES).weight_LE.detach().clone()

    head = make_head(group, rate=0.3)
    optimizer = make_optimizer(head)
    for step in range(3):
        head.resample(step)
        head(*make_batch(step, group))
        gradient = head.grad_LE.clone()
        norm = optimizer.step(1e-2)
    target = folder / str(group.size)
    target.mkdir(exist_ok=True)
    save_head(target, head, optimizer)

    return {
        "initial": initial,
        "sampled": sampled_for_two_batches(group, "uniform"),
        "sampled around labels": sampled_for_two_batches(group, "partial_fc"),
        "gradient": gradient,
        "cleared": not head.grad_LE.any() and not head.touched_L.any(),
        "norm": norm,
        "state": state_of(head, optimizer),
        "accumulated": accumulated_gradient(group, num_micro_batches=3),
        "at once": accumulated_gradient(group, num_micro_batches=1),
        "not weighted": accumulated_gradient(group, num_micro_batches=3, is_weighted=False),
        "apart": [
            accumulated_gradient(group, *way, head=make_head(group, rate=0.5, is_apart=True))
            for way in ((3,), (1,), (3, False))
        ],
    }


def sampled_for_two_batches(group: Group, sampling: str) -> tuple[Tensor, Tensor]:
    """The classes that one step's sample has for one batch and, in a head of its own, for another."""
    sampled = []
    for number in (1, 2):
        head = make_head(group, rate=0.5, sampling=sampling)
        head.resample(4)
        head(*make_batch(number, group))
        sampled.append(head.samples[0].clone())
    return sampled[0], sampled[1]


def make_optimizer(head: PartialFCHead, max_norm: float = 5.0) -> RowOptimizer:
    return head_optimizer(head, OptimizerConfig(lr=1e-2, warmup_steps=0, head_clip_norm=max_norm))


def accumulated_gradient(
    group: Group, num_micro_batches: int, is_weighted: bool = True, head: PartialFCHead | None = None
) -> tuple[Tensor, Tensor]:
    """Mean loss and the centres' gradient over the micro-batches of one global batch."""
    head = head or make_head(group)
    head.resample(0)
    emb_BE, labels_BP = make_batch(7, group)
    outputs = [
        head(emb, labels, weight=1 / num_micro_batches if is_weighted else 1.0)
        for emb, labels in zip(emb_BE.chunk(num_micro_batches), labels_BP.chunk(num_micro_batches), strict=True)
    ]
    return torch.stack([output.loss for output in outputs]).mean(), head.grad_LE


def state_of(head: PartialFCHead, optimizer: RowOptimizer) -> dict[str, Tensor]:
    return {"weight": head.weight_LE.detach(), **optimizer.state}


def load_all(group: Group, folder: Path) -> dict[int, dict[str, Tensor]]:
    """What this rank reads from the states of every number of ranks, and a step of the optimizer after it."""
    loaded = {}
    for num_writers in RANK_COUNTS:
        head = make_head(group)
        optimizer = make_optimizer(head)
        load_head(folder / str(num_writers), head, optimizer)
        state = {name: tensor.clone() for name, tensor in state_of(head, optimizer).items()}
        head.config = HeadConfig(sample_rate=1.0)  # a sample depends on the ranks' ranges
        head.resample(3)
        head(*make_batch(3, group))
        optimizer.step(1e-2)
        loaded[num_writers] = {**state, "next": head.weight_LE.detach(), "next step": optimizer.state["step"]}
    return loaded


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def by_ranks(saved: Path) -> dict[int, list[dict]]:
    return {num_ranks: run_ranks(run_head, num_ranks, saved) for num_ranks in RANK_COUNTS}


def whole(ranks: list[dict], key: str) -> Tensor:
    return torch.cat([rank[key] for rank in ranks])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_initial_centres_do_not_depend_on_the_number_of_ranks(by_ranks: dict, num_ranks: int) -> None:
    alone, shared = whole(by_ranks[1], "initial"), whole(by_ranks[num_ranks], "initial")
    assert alone.shape == (MANY_CLASSES, DIM) and torch.equal(alone, shared)
    assert abs(alone.std().item() - 0.1) < 1e-3 and abs(alone.mean().item()) < 2e-3
    assert len(torch.unique(alone[:, 0])) > 0.99 * MANY_CLASSES, "blocks repeat each other"


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_sampled_classes_do_not_depend_on_the_labels(by_ranks: dict, num_ranks: int) -> None:
    for rank in by_ranks[num_ranks]:
        one, other = rank["sampled"]
        assert torch.equal(one, other) and len(one) == round(0.5 * len(rank["state"]["weight"]))
        one, other = rank["sampled around labels"]
        assert not torch.equal(one, other), "known-bad twin: a sampler that takes the labels in"


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_the_norm_is_that_over_all_shards(by_ranks: dict, num_ranks: int) -> None:
    ranks = by_ranks[num_ranks]
    for rank in ranks:
        assert rank["cleared"]
        assert_close("norm", rank["norm"], whole(ranks, "gradient").double().norm(), 5e-7)  # measured 6e-8
    if num_ranks > 1:
        assert_differs("norm of one shard", ranks[0]["norm"], ranks[0]["gradient"].norm(), 5e-7)


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_micro_batches_add_up_to_the_batch(by_ranks: dict, num_ranks: int) -> None:
    for rank in by_ranks[num_ranks]:
        for accumulated, at_once, not_weighted in (
            [rank[way] for way in ("accumulated", "at once", "not weighted")],
            rank["apart"],
        ):
            (loss, grad), (expected_loss, expected_grad) = accumulated, at_once
            assert_close("loss", loss, expected_loss, 1e-6)  # measured 1e-7
            assert_close("gradient", grad, expected_grad, 2e-6)  # measured 3e-7
            assert_differs("not weighted", not_weighted[1], expected_grad, 2e-6)


def test_repeats_within_an_image_count_once() -> None:
    labels_GP = torch.tensor([[5, 5, 5, 2], [-1, 3, -1, 3], [1, 2, 3, 4]])
    assert without_repeats(labels_GP).tolist() == [[5, -1, -1, 2], [-1, 3, -1, -1], [1, 2, 3, 4]]


@functools.cache
def loaded_by(num_readers: int, folder: Path) -> list[dict[int, dict[str, Tensor]]]:
    return run_ranks(load_all, num_readers, folder)


@pytest.mark.parametrize("num_readers", RANK_COUNTS)
@pytest.mark.parametrize("num_writers", RANK_COUNTS)
def test_state_of_any_number_of_ranks_is_read_by_any_other(
    saved: Path, by_ranks: dict, num_writers: int, num_readers: int
) -> None:
    written = [rank["state"] for rank in by_ranks[num_writers]]
    read = [rank[num_writers] for rank in loaded_by(num_readers, saved)]
    for name in ("weight", "exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(whole(written, name), whole(read, name)), name
        assert whole(read, name).abs().sum() > 0
    assert set(whole(read, "step").tolist()) > {1, 2}, "rows were touched a different number of times"
    assert torch.equal(whole(read, "next step"), whole(read, "step") + 1), "the optimizer goes on from what was loaded"
    continued = [rank[num_writers]["next"] for rank in loaded_by(1, saved)]
    assert_close("a step later", torch.cat([state["next"] for state in read]), torch.cat(continued), 1e-5)


def test_files_under_each_others_names_are_told_apart(saved: Path, by_ranks: dict, tmp_path: Path) -> None:
    """The known-bad twin: two ranks' states are exchanged. (A checkpoint's checksums would notice it before.)"""
    shutil.copytree(saved, tmp_path / "saved")
    one, other, _ = sorted((tmp_path / "saved" / "3").iterdir())
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    written = [rank["state"] for rank in by_ranks[3]]
    read = [rank[3] for rank in loaded_by(1, tmp_path / "saved")]
    assert not torch.equal(whole(written, "exp_avg"), whole(read, "exp_avg"))


@dataclass(frozen=True)
class Place:
    """A rank of so many, for what needs no collective."""

    rank: int
    size: int


def head_at(rank: int, size: int) -> tuple[PartialFCHead, RowOptimizer]:
    """One shard of a head of 83 classes, all zero."""
    place = Place(rank, size)
    loss = ClassLoss(ClassLossConfig())
    head = PartialFCHead(83, DIM, HeadConfig(), loss, HeadGroups(classes=place, data=place), seed=3)
    optimizer = make_optimizer(head)
    for tensor in state_of(head, optimizer).values():
        tensor.zero_()
    return head, optimizer


@pytest.mark.parametrize("num_writers", [1, 2, 3, 80])
@pytest.mark.parametrize("num_readers", [1, 2, 3, 80])
def test_eighty_shards(tmp_path: Path, num_writers: int, num_readers: int) -> None:
    """In one process: what is written and read depends on nothing but rank and size."""
    for rank in range(num_writers):
        head, optimizer = head_at(rank, num_writers)
        for number, tensor in enumerate(state_of(head, optimizer).values()):
            classes = torch.arange(head.classes.begin, head.classes.end) + 1
            tensor += (classes * 10 + number).view(-1, *[1] * (tensor.ndim - 1)).to(tensor.dtype)
        save_head(tmp_path, head, optimizer)
    assert len(list(tmp_path.iterdir())) == num_writers
    read = [head_at(rank, num_readers) for rank in range(num_readers)]
    for head, optimizer in read:
        load_head(tmp_path, head, optimizer)
    for number, name in enumerate(state_of(*read[0])):
        rows = torch.cat([state_of(*shard)[name] for shard in read])
        expected = (torch.arange(1, 84) * 10 + number).to(rows.dtype)
        assert (rows.reshape(83, -1) == expected[:, None]).all(), name


def load_damaged(group: Group, folder: Path) -> str:
    head = make_head(group)
    optimizer = make_optimizer(head)
    try:
        load_head(folder, head, optimizer)
    except UserError as error:
        return str(error)
    return ""


def load_all_damaged(group: Group, folders: list[Path]) -> list[str]:
    return [load_damaged(group, folder) for folder in folders]


def test_missing_and_damaged_files_are_named(saved: Path, by_ranks: dict, tmp_path: Path) -> None:
    names = sorted(path.name for path in (saved / "3").iterdir())
    folders = [tmp_path / name for name in ("missing", "last", "truncated", "short", "empty", "none", "rows", "sgd")]
    for folder in (*folders[:-3], *folders[-2:]):
        shutil.copytree(saved / "3", folder)
    folders[5].mkdir()
    tensors = load_file(saved / "3" / names[1])
    save_file({name: tensor[:-1].clone() for name, tensor in tensors.items()}, folders[6] / names[1])
    of_sgd = {"weight": tensors["weight"], "momentum": tensors["exp_avg"], "step": tensors["step"]}
    save_file(of_sgd, folders[7] / names[1])
    (folders[0] / names[1]).unlink()
    (folders[1] / names[2]).unlink()
    for folder, num_bytes in zip(folders[2:5], (-1, 20, 0), strict=True):
        path = folder / names[1]
        path.write_bytes(path.read_bytes()[:num_bytes])
    missing, last, *broken, none, rows, sgd = run_ranks(load_all_damaged, 1, folders)[0]
    assert f"{folders[0]}: no head file holds classes 12 to 23" in missing and names[1] in missing
    assert "no head file holds classes 24 to 36" in last and names[2] in last
    for folder, message in zip(folders[2:5], broken, strict=True):
        assert str(folder / names[1]) in message, message
    assert "no head file holds classes 0 to 36" in none
    assert str(folders[-2] / names[1]) in rows and "[11, 8] instead of [12, 8]" in rows
    assert str(folders[-1] / names[1]) in sgd and "'exp_avg'" in sgd and "head.optimizer" in sgd
