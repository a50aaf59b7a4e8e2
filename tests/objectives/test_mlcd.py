"""The MLCD loss and its gradients on 1, 2 and 3 ranks, against the paper's equations written out in float64."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from pydantic import ValidationError
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead
from mlcd_ds.objectives.mlcd import MLCDConfig, MLCDLoss

NUM_CLASSES, DIM, BATCH, NUM_LABELS = 37, 8, 4, 3  # 37 divides by neither 2 nor 3
STEP = 5


@dataclass(frozen=True)
class Case:
    """Settings of the loss, and which labels the images have."""

    scale: float
    margin: float
    form: str
    rate: float
    labels: str = "random"


CASES = {
    "cosface": Case(16, 0.3, "cosface", 1.0),
    "cosface, s 64, r .1": Case(64, 0.3, "cosface", 0.1),
    "cosface, s 64, r .5": Case(64, 0.3, "cosface", 0.5),
    "arcface": Case(16, 0.3, "arcface", 1.0),
    "arcface, s 64, r .5": Case(64, 0.5, "arcface", 0.5),
    "no margin, r .5": Case(16, 0.3, "none", 0.5),
    "no margin, s 64": Case(64, 0.3, "none", 1.0),
    "r .1": Case(16, 0.3, "cosface", 0.1),
    "positives on the first rank only": Case(16, 0.3, "cosface", 0.5, "first classes"),
    "all images have the same labels": Case(16, 0.3, "cosface", 0.5, "shared"),
    "repeated labels and padding": Case(16, 0.3, "cosface", 0.5, "repeated"),
    "no labels at all": Case(16, 0.3, "cosface", 0.5, "none"),
}
EXTREMES = {form: Case(64, 0.3, form, 1.0, "aligned") for form in ("cosface", "none", "arcface")}
# Measured over all cases and rank counts, relative to the largest entry: losses 1.2e-7, gradients 2.0e-6 (s 64 without
# margin: fp32 cosines are off by 6e-8, and s makes that 4e-6 in an exponent) and below 1e-6 elsewhere.
LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-6, 1e-5


def make_labels(kind: str, num_images: int) -> Tensor:
    """int64 [G, P], -1 for none."""
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randperm(NUM_CLASSES, generator=generator)[:NUM_LABELS] for _ in range(num_images)]
    labels_GP = torch.stack(rows)
    if kind == "first classes":
        labels_GP = labels_GP % 12 * torch.ones_like(labels_GP)
    elif kind == "shared":
        labels_GP = labels_GP[:1].repeat(num_images, 1)
    elif kind == "repeated":
        labels_GP[0::4, 1] = labels_GP[0::4, 0]
        labels_GP[1::4, 1:] = -1
        labels_GP[2::4] = -1
        labels_GP[3::4] = labels_GP[3::4, :1]
    elif kind == "none":
        labels_GP.fill_(-1)
    return labels_GP


def make_embeddings(labels_GP: Tensor, weight_CE: Tensor, kind: str) -> Tensor:
    """Unit fp32 [G, E]: every other image near one of its centres, so that the constant 1 in the logarithm counts."""
    emb_GE = torch.randn(len(labels_GP), DIM, generator=torch.Generator().manual_seed(12))
    first_G = labels_GP[:, 0].clamp_min(0)
    if kind == "aligned":  # cosines of exactly 1 and -1
        signs_G1 = torch.tensor([1.0, -1.0]).repeat(len(labels_GP))[: len(labels_GP), None]
        emb_GE = weight_CE[first_G] * signs_G1
    else:
        emb_GE[::2] = weight_CE[first_G][::2] * 3 / weight_CE.norm(dim=1).mean() + 0.5 * emb_GE[::2]
    return torch.nn.functional.normalize(emb_GE, dim=1)


def run_cases(group: Group, cases: dict[str, Case]) -> dict[str, dict[str, Tensor]]:
    """Per case: inputs of all ranks, and what the head makes of them on this one."""
    results = {}
    for name, case in cases.items():
        objective = MLCDLoss(MLCDConfig(scale=case.scale, margin=case.margin, margin_form=case.form))
        head = PartialFCHead(NUM_CLASSES, DIM, HeadConfig(sample_rate=case.rate, init_std=1.0), objective, group, 3)
        head.init_weights()
        head.resample(STEP)
        weight_CE = torch.cat(group.gather_objects(head.weight_LE.detach()))
        labels_GP = make_labels(case.labels, BATCH * group.size)
        emb_GE = make_embeddings(labels_GP, weight_CE, case.labels)
        mine = slice(group.rank * BATCH, (group.rank + 1) * BATCH)
        output = head(emb_GE[mine], labels_GP[mine])
        results[name] = {
            "weight_CE": weight_CE,
            "labels_GP": labels_GP,
            "emb_GE": emb_GE,
            "sampled": head.sampled_S + head.classes.begin,
            "loss": output.loss,
            "negative_term": output.negative_term,
            "positive_term": output.positive_term,
            "emb_grad_BE": output.emb_grad_BE,
            "weight_grad_LE": head.weight_LE.grad,
        }
    return results


def margin_of(cosine: Tensor, margin: float, form: str) -> Tensor:
    """Straight from the definitions, by the angle."""
    if form == "cosface":
        return cosine - margin
    if form == "arcface":
        angle = torch.acos(cosine.clamp(-1, 1))
        return torch.cos(angle + margin) if angle < math.pi - margin else cosine - 1 + math.cos(margin)
    return cosine


def oracle(
    ranks: list[dict[str, Tensor]],
    case: Case,
    *,
    mask_own: bool = True,
    with_one: bool = True,
    classes: range = range(NUM_CLASSES),
) -> dict[str, Tensor]:
    """Eq. 4-5 over sets of classes, image by image, in float64. The keywords make known-bad twins."""
    emb_GE = ranks[0]["emb_GE"].double().requires_grad_()
    weight_CE = ranks[0]["weight_CE"].double().requires_grad_()
    sampled = {int(c) for rank in ranks for c in rank["sampled"]}
    one = [torch.zeros((), dtype=torch.float64)] if with_one else []
    tiny = [torch.tensor(-1e3, dtype=torch.float64)]  # so that an empty sum has a logarithm
    negatives, positives = [], []
    for emb_E, labels in zip(emb_GE, ranks[0]["labels_GP"].tolist(), strict=True):
        own = {c for c in labels if c >= 0}

        def cosine(c: int, emb_E: Tensor = emb_E) -> Tensor:
            return emb_E @ (weight_CE[c] / weight_CE[c].norm())

        z_neg = [case.scale * cosine(c) for c in sorted(sampled) if c in classes and not (mask_own and c in own)]
        z_pos = [case.scale * margin_of(cosine(c), case.margin, case.form) for c in sorted(own) if c in classes]
        negatives.append(torch.logsumexp(torch.stack(one + tiny + z_neg), 0))
        positives.append(torch.logsumexp(torch.stack(one + tiny + [-z for z in z_pos]), 0))
    negative_term, positive_term = torch.stack(negatives).mean(), torch.stack(positives).mean()
    loss = negative_term + positive_term
    loss.backward()
    return {
        "loss": loss.detach(),
        "negative_term": negative_term.detach(),
        "positive_term": positive_term.detach(),
        "emb_grad": emb_GE.grad,
        "weight_grad": weight_CE.grad,
    }


@functools.cache
def results_of(num_ranks: int) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(run_cases, num_ranks, {**CASES, **{f"extreme {form}": c for form, c in EXTREMES.items()}})


def of_case(num_ranks: int, name: str) -> list[dict[str, Tensor]]:
    return [rank[name] for rank in results_of(num_ranks)]


def whole(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The head's results in the oracle's shapes: gradients of all ranks in a row."""
    return {
        **{key: ranks[0][key] for key in ("loss", "negative_term", "positive_term")},
        "emb_grad": torch.cat([rank["emb_grad_BE"] for rank in ranks]),
        "weight_grad": torch.cat([rank["weight_grad_LE"] for rank in ranks]),
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_dense_oracle(name: str, num_ranks: int) -> None:
    ranks = of_case(num_ranks, name)
    expected, got = oracle(ranks, CASES[name]), whole(ranks)
    for key in ("loss", "negative_term", "positive_term"):
        assert len({rank[key].item() for rank in ranks}) == 1, f"{key} differs between ranks"
        assert_close(key, got[key], expected[key], LOSS_TOLERANCE)
    assert_close("gradient of the embeddings", got["emb_grad"], expected["emb_grad"], GRAD_TOLERANCE)
    assert_close("gradient of the centres", got["weight_grad"], expected["weight_grad"], GRAD_TOLERANCE)
    untouched = expected["weight_grad"].abs().sum(dim=1) == 0
    assert not got["weight_grad"][untouched].any(), "a centre that the loss does not see has a gradient"


def test_the_cases_hold_what_they_promise() -> None:
    ranks = of_case(3, "positives on the first rank only")
    assert ranks[0]["labels_GP"].max() < len(ranks[0]["weight_grad_LE"])
    hits = [
        c in set(labels)
        for case in CASES
        for labels in of_case(2, case)[0]["labels_GP"].tolist()
        for rank in of_case(2, case)
        for c in rank["sampled"].tolist()
        if CASES[case].rate < 1
    ]
    assert 10 < sum(hits) < len(hits), "own positives are among the sampled classes"
    lengths = [len(rank["weight_grad_LE"]) for rank in of_case(3, "cosface")]
    assert lengths == [12, 12, 13]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("form", EXTREMES)
def test_cosines_of_one_stay_finite_at_scale_64(form: str, num_ranks: int) -> None:
    ranks = of_case(num_ranks, f"extreme {form}")
    expected, got = oracle(ranks, EXTREMES[form]), whole(ranks)
    cosines_GC = ranks[0]["emb_GE"] @ torch.nn.functional.normalize(ranks[0]["weight_CE"], dim=1).T
    assert cosines_GC.max() > 1 - 1e-6 and cosines_GC.min() < -1 + 1e-6
    for value in got.values():
        assert torch.isfinite(value).all()
    for key in ("loss", "negative_term", "positive_term"):
        assert_close(key, got[key], expected[key], LOSS_TOLERANCE)
    if form != "arcface":  # its slope is infinite at cos = 1; fp32 puts a bound to it
        assert_close("gradient of the embeddings", got["emb_grad"], expected["emb_grad"], GRAD_TOLERANCE)
        assert_close("gradient of the centres", got["weight_grad"], expected["weight_grad"], GRAD_TOLERANCE)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_known_bad_twins_are_told_apart(num_ranks: int) -> None:
    name = "cosface, s 64, r .5"
    ranks, case = of_case(num_ranks, name), CASES[name]
    got = whole(ranks)

    unmasked = oracle(ranks, case, mask_own=False)
    assert_differs("own positives as negatives", got["negative_term"], unmasked["negative_term"], LOSS_TOLERANCE)
    assert_differs("own positives as negatives", got["weight_grad"], unmasked["weight_grad"], GRAD_TOLERANCE)

    no_margin = oracle(ranks, Case(case.scale, 0.0, case.form, case.rate))
    assert_differs("no margin", got["positive_term"], no_margin["positive_term"], LOSS_TOLERANCE)
    assert_differs("no margin", got["emb_grad"], no_margin["emb_grad"], GRAD_TOLERANCE)
    other_form = oracle(ranks, Case(case.scale, case.margin, "arcface", case.rate))
    assert_differs("other margin", got["positive_term"], other_form["positive_term"], LOSS_TOLERANCE)

    summed = oracle(ranks, case)["weight_grad"] * len(ranks[0]["emb_GE"])
    assert_differs("sum instead of mean", got["weight_grad"], summed, GRAD_TOLERANCE)

    for name, key in {"no margin, r .5": "positive_term", "r .1": "negative_term"}.items():
        ranks, case = of_case(num_ranks, name), CASES[name]
        got, without_one = whole(ranks), oracle(ranks, case, with_one=False)
        assert_differs("constant 1 left out", got[key], without_one[key], LOSS_TOLERANCE)
        assert_differs("constant 1 left out", got["emb_grad"], without_one["emb_grad"], GRAD_TOLERANCE)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_gradient_that_is_not_summed_over_ranks_is_told_apart(num_ranks: int) -> None:
    ranks, case = of_case(num_ranks, "cosface"), CASES["cosface"]
    got = whole(ranks)
    ends = list(itertools.accumulate(len(rank["weight_grad_LE"]) for rank in ranks))
    for begin, end in zip([0, *ends], ends, strict=False):
        alone = oracle(ranks, case, classes=range(begin, end))
        assert_differs("classes of one rank", got["emb_grad"], alone["emb_grad"], GRAD_TOLERANCE)
        assert_differs("classes of one rank", got["loss"], alone["loss"], LOSS_TOLERANCE)
    averaged = oracle(ranks, case)["emb_grad"] / num_ranks
    assert_differs("averaged over ranks", got["emb_grad"], averaged, GRAD_TOLERANCE)


def test_two_terms_are_the_factored_loss() -> None:
    """log(1 + A) + log(1 + B) = log(1 + A + B + AB), the paper's Eq. 5 without an image's own pairs of zeros."""
    loss = MLCDLoss(MLCDConfig(scale=16.0, margin=0.3))
    generator = torch.Generator().manual_seed(0)
    negatives_GS = torch.rand(5, 20, generator=generator, dtype=torch.float64) * 2 - 1
    positives_K = torch.rand(9, generator=generator, dtype=torch.float64) * 2 - 1
    images_K = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 4])
    terms = loss.terms(loss.negative_sums(negatives_GS), loss.positive_sums(positives_K, images_K, 5))
    A_G = torch.exp(16 * negatives_GS).sum(dim=1)
    B_G = torch.stack([torch.exp(-16 * (positives_K[images_K == b] - 0.3)).sum() for b in range(5)])
    # float64 throughout: measured 2e-16
    assert_close("factored", terms[0] + terms[1], torch.log(1 + A_G + B_G + A_G * B_G), 1e-13)
    assert_differs("without the product", terms[0] + terms[1], torch.log(1 + A_G + B_G), 1e-13)
    assert terms[1][3] == 0  # an image without a positive


def test_slopes_are_the_derivatives_of_the_terms() -> None:
    loss = MLCDLoss(MLCDConfig(scale=8.0, margin=0.3, margin_form="arcface"))
    sums_2G = torch.tensor([[1e-3, 0.2, 40.0], [1e-4, 3.0, 7.0]], dtype=torch.float64, requires_grad=True)
    torch.stack(loss.terms(*sums_2G)).sum().backward()
    # float64: measured 2e-16
    assert_close("slopes", torch.stack(loss.slopes(*sums_2G.detach())), sums_2G.grad, 1e-13)


@pytest.mark.parametrize(
    ("scale", "margin", "form"),
    [
        (1.0, 0.3, "cosface"),
        (64.0, 0.3, "cosface"),
        (64.0, 0.99, "cosface"),
        (107.0, 0.3, "cosface"),
        (64.0, 0.5, "arcface"),
        (64.0, 0.99, "arcface"),
        (140.0, 0.3, "none"),
    ],
)
def test_sums_stay_inside_fp32_over_the_whole_range_of_settings(scale: float, margin: float, form: str) -> None:
    """Millions of the largest summands do not overflow, and the constant 1 does not vanish from an empty sum."""
    loss = MLCDLoss(MLCDConfig(scale=scale, margin=margin, margin_form=form))
    largest = loss.negative_sums(torch.ones(1, 1)) * 4e6
    worst = loss.positive_sums(torch.full((1,), -1.0), torch.zeros(1, dtype=torch.int64), 1) * 64
    terms = torch.stack(loss.terms(largest, worst))
    least = margin_of(torch.tensor(-1.0, dtype=torch.float64), margin, form).item()
    expected = torch.tensor([[scale + math.log(4e6)], [-scale * least + math.log(64)]])
    if scale == 1.0:  # the constant counts
        expected = torch.log1p(torch.exp(expected))
    assert_close("terms", terms, expected, 1e-6)  # measured 1e-7
    empty = torch.stack(loss.terms(torch.zeros(1), torch.zeros(1)))
    assert empty.abs().max() < 2e-5  # log(1) = 0, up to fp32's rounding of a shift of up to 70
    assert torch.isfinite(torch.stack(loss.slopes(torch.zeros(1), torch.zeros(1)))).all()


@pytest.mark.parametrize(
    ("scale", "margin", "form"), [(140.0, 0.3, "cosface"), (110.0, 0.9, "arcface"), (150.0, 0.0, "none")]
)
def test_settings_that_leave_fp32_are_refused(scale: float, margin: float, form: str) -> None:
    with pytest.raises(ValidationError, match="scale"):
        MLCDConfig(scale=scale, margin=margin, margin_form=form)
