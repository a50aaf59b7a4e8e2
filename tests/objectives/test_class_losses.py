"""The losses and their gradients on 1, 2 and 3 ranks, against their equations written out in float64."""

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
from mlcd_ds.heads.groups import make_head_groups
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead
from mlcd_ds.objectives.class_losses import ClassLoss, ClassLossConfig

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
    name: str = "mlcd"
    num_labels: int | None = None
    feature_rate: float = 1.0
    sampling: str = "uniform"
    similarity_filter: float | None = None
    separate_samples: bool = False


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
    "two nearest labels": Case(16, 0.3, "cosface", 0.5, num_labels=2),
    "some dimensions": Case(16, 0.3, "cosface", 0.5, feature_rate=0.5),
    "partial_fc": Case(16, 0.3, "cosface", 0.2, sampling="partial_fc"),
    "mlc": Case(16, 0.3, "cosface", 0.5, "repeated", "mlc"),
    "mlc, s 64": Case(64, 0.3, "cosface", 0.5, name="mlc"),
    "unicom": Case(16, 0.3, "arcface", 0.5, name="unicom", feature_rate=0.5),
    "unicom, s 64": Case(64, 0.3, "cosface", 0.5, "repeated", "unicom"),
    "averaged softmax": Case(16, 0.3, "cosface", 0.5, "repeated", "averaged_softmax"),
    "averaged softmax, s 64": Case(64, 0.3, "cosface", 0.5, name="averaged_softmax"),
    "filter": Case(16, 0.3, "cosface", 1.0, similarity_filter=0.4),
    "filter, s 70": Case(70, 0.3, "cosface", 1.0, "repeated", "mlc", similarity_filter=0.1),
    "filter, some dimensions": Case(16, 0.3, "arcface", 0.5, name="unicom", feature_rate=0.5, similarity_filter=0.4),
    "separate samples": Case(16, 0.3, "cosface", 1.0, "repeated", "averaged_softmax", separate_samples=True),
    "separate samples, r .5": Case(16, 0.3, "cosface", 0.5, name="averaged_softmax", separate_samples=True),
    "separate samples, partial_fc, filter": Case(
        64, 0.3, "cosface", 0.3, "random", "averaged_softmax", 2, 1.0, "partial_fc", 0.3, separate_samples=True
    ),
    "separate samples, filter, some dimensions": Case(
        16, 0.3, "cosface", 0.5, "repeated", "averaged_softmax", None, 0.5, "uniform", 0.4, separate_samples=True
    ),
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


def objective_of(case: Case) -> ClassLoss:
    return ClassLoss(
        ClassLossConfig(
            name=case.name,
            scale=case.scale,
            margin=case.margin,
            margin_form=case.form,
            num_labels=case.num_labels,
            feature_rate=case.feature_rate,
            similarity_filter=case.similarity_filter,
            separate_samples=case.separate_samples,
        )
    )


def run_cases(group: Group, cases: dict[str, Case]) -> dict[str, dict[str, Tensor]]:
    """Per case: inputs of all ranks, and what the head makes of them on this one."""
    results = {}
    for name, case in cases.items():
        config = HeadConfig(sample_rate=case.rate, sampling=case.sampling, init_std=1.0)
        head = PartialFCHead(NUM_CLASSES, DIM, config, objective_of(case), make_head_groups(group), 3)
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
            "samples": [head.samples[place] + head.classes.begin for place in sorted(head.samples)],
            "sampled": torch.cat(list(head.samples.values())).unique() + head.classes.begin,
            "features": range(DIM) if case.feature_rate == 1 else head._features_F,
            "loss": output.loss,
            **output.parts,
            "emb_grad_BE": output.emb_grad_BE,
            "weight_grad_LE": head.grad_LE.clone(),
            "touched_L": head.touched_L.clone(),
        }
        head.grad_LE.zero_(), head.touched_L.zero_()
        head.allow_host_sync = False  # the form of a GPU: static shapes
        output = head(emb_GE[mine], labels_GP[mine])
        results[name]["static"] = (output.loss, output.emb_grad_BE, head.grad_LE.clone(), head.touched_L.clone())
        results[name]["static, known bad"] = head(emb_GE[mine], labels_GP[mine].roll(1, 0)).loss
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
    with_filter: bool = True,
    one_sample: bool = False,
    mask_others: bool = False,
    by_places: bool = False,
    classes: range = range(NUM_CLASSES),
) -> dict[str, Tensor]:
    """Eq. 4-5 over sets of classes, image by image, in float64. The keywords make known-bad twins."""
    emb_GE = ranks[0]["emb_GE"].double().requires_grad_()
    weight_CE = ranks[0]["weight_CE"].double().requires_grad_()
    by_place = zip(*(rank["samples"] for rank in ranks), strict=True)
    samples = [{int(c) for sample in of_ranks for c in sample} for of_ranks in by_place]
    features = [int(feature) for feature in ranks[0]["features"]]
    unit_CF = weight_CE[:, features] / weight_CE[:, features].norm(dim=1, keepdim=True)
    zero = torch.zeros((), dtype=torch.float64)
    one = [zero] if with_one else []
    tiny = [zero - 1e3]  # so that an empty sum has a logarithm
    num_labels = 1 if case.name == "unicom" else case.num_labels
    limit = case.similarity_filter if with_filter and case.similarity_filter is not None else math.inf
    parts = []
    for emb_E, labels in zip(emb_GE, ranks[0]["labels_GP"][:, :num_labels].tolist(), strict=True):
        own = {c for c in labels if c >= 0}
        emb_F = emb_E[features] if len(features) == DIM else emb_E[features] / emb_E[features].norm()
        cosines = (unit_CF @ emb_F).unbind()

        def log_sum(sampled: set[int], masked: set[int], cosines: tuple[Tensor, ...] = cosines) -> Tensor:
            """n over the sampled classes without the masked ones."""
            chosen = [cosines[c] for c in sorted(sampled) if c in classes and not (mask_own and c in masked)]
            return torch.logsumexp(
                torch.stack(tiny + [case.scale * cos if cos <= limit else zero for cos in chosen]), 0
            )

        z_of = {c: case.scale * margin_of(cosines[c], case.margin, case.form) for c in sorted(own) if c in classes}
        z_pos, n = list(z_of.values()), log_sum(samples[0], own)
        p = torch.logsumexp(torch.stack(tiny + [-z for z in z_pos]), 0)
        if case.name == "mlcd":
            parts.append({"negatives": torch.logsumexp(torch.stack([*one, n]), 0)})
            parts[-1]["positives"] = torch.logsumexp(torch.stack([*one, p]), 0)
        elif case.separate_samples:
            sample_of = {c: samples[0 if one_sample else labels.index(c)] for c in z_of}
            n_of = {c: log_sum(sample_of[c], own if mask_others else {c}) for c in z_of}
            losses = [-torch.log(z.exp() / (z.exp() + n_of[c].exp())) for c, z in z_of.items()]
            count = len(labels) if by_places else max(1, len(losses))
            parts.append({"softmax": sum(losses, torch.zeros(())) / count})
        elif case.name == "averaged_softmax":
            losses = [-torch.log(z.exp() / (z.exp() + n.exp())) for z in z_pos]
            parts.append({"softmax": sum(losses, torch.zeros(())) / max(1, len(losses))})
        elif case.name == "unicom":
            parts.append({"joint": -torch.log(z_pos[0].exp() / (z_pos[0].exp() + n.exp())) if z_pos else n * 0})
        else:
            parts.append({"joint": torch.log(1 + n.exp() * p.exp())})
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    loss = sum(means.values())
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: value.detach() for name, value in means.items()},
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
        **{key: ranks[0][key] for key in ("loss", "negatives", "positives", "joint", "softmax") if key in ranks[0]},
        "emb_grad": torch.cat([rank["emb_grad_BE"] for rank in ranks]),
        "weight_grad": torch.cat([rank["weight_grad_LE"] for rank in ranks]),
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_dense_oracle(name: str, num_ranks: int) -> None:
    ranks = of_case(num_ranks, name)
    expected, got = oracle(ranks, CASES[name]), whole(ranks)
    for key in expected.keys() - {"emb_grad", "weight_grad"}:
        assert len({rank[key].item() for rank in ranks}) == 1, f"{key} differs between ranks"
        assert_close(key, got[key], expected[key], LOSS_TOLERANCE)
    assert_close("gradient of the embeddings", got["emb_grad"], expected["emb_grad"], GRAD_TOLERANCE)
    assert_close("gradient of the centres", got["weight_grad"], expected["weight_grad"], GRAD_TOLERANCE)
    touched = torch.cat([rank["touched_L"] for rank in ranks]) > 0
    sampled = {int(c) for rank in ranks for c in rank["sampled"]}
    labels = ranks[0]["labels_GP"][:, : objective_of(CASES[name]).num_labels]
    assert touched.nonzero().flatten().tolist() == sorted(sampled | set(labels[labels >= 0].tolist()))
    assert not got["weight_grad"][~touched].any(), "a centre that the loss does not see has a gradient"


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_static_shapes_give_the_same(name: str, num_ranks: int) -> None:
    for rank in of_case(num_ranks, name):
        loss, emb_grad, weight_grad, touched = rank["static"]
        assert_close("loss", loss, rank["loss"], LOSS_TOLERANCE)
        assert_close("gradient of the embeddings", emb_grad, rank["emb_grad_BE"], GRAD_TOLERANCE)
        assert_close("gradient of the centres", weight_grad, rank["weight_grad_LE"], GRAD_TOLERANCE)
        assert torch.equal(touched, rank["touched_L"]) and touched.any()
        if name not in ("all images have the same labels", "no labels at all"):
            assert_differs("labels of other images", rank["static, known bad"], rank["loss"], LOSS_TOLERANCE)


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
    for key in ("loss", "negatives", "positives"):
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
    assert_differs("own positives as negatives", got["negatives"], unmasked["negatives"], LOSS_TOLERANCE)
    assert_differs("own positives as negatives", got["weight_grad"], unmasked["weight_grad"], GRAD_TOLERANCE)

    no_margin = oracle(ranks, Case(case.scale, 0.0, case.form, case.rate))
    assert_differs("no margin", got["positives"], no_margin["positives"], LOSS_TOLERANCE)
    assert_differs("no margin", got["emb_grad"], no_margin["emb_grad"], GRAD_TOLERANCE)
    other_form = oracle(ranks, Case(case.scale, case.margin, "arcface", case.rate))
    assert_differs("other margin", got["positives"], other_form["positives"], LOSS_TOLERANCE)

    summed = oracle(ranks, case)["weight_grad"] * len(ranks[0]["emb_GE"])
    assert_differs("sum instead of mean", got["weight_grad"], summed, GRAD_TOLERANCE)

    for name, key in {"no margin, r .5": "positives", "r .1": "negatives"}.items():
        ranks, case = of_case(num_ranks, name), CASES[name]
        got, without_one = whole(ranks), oracle(ranks, case, with_one=False)
        assert_differs("constant 1 left out", got[key], without_one[key], LOSS_TOLERANCE)
        assert_differs("constant 1 left out", got["emb_grad"], without_one["emb_grad"], GRAD_TOLERANCE)


# Case, and what a twin of its oracle does otherwise.
TWINS = [
    *((name, {"with_filter": False}) for name, case in CASES.items() if case.similarity_filter is not None),
    *((name, {"one_sample": True}) for name, case in CASES.items() if case.separate_samples and case.rate < 1),
    ("separate samples, r .5", {"mask_others": True}),
    ("separate samples", {"by_places": True}),
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("name", "mistake"), TWINS)
def test_mistakes_with_filter_and_samples_are_told_apart(name: str, mistake: dict[str, bool], num_ranks: int) -> None:
    ranks = of_case(num_ranks, name)
    got, twin = whole(ranks), oracle(ranks, CASES[name], **mistake)
    for key, tolerance in {"loss": LOSS_TOLERANCE, "emb_grad": GRAD_TOLERANCE, "weight_grad": GRAD_TOLERANCE}.items():
        assert_differs(f"{name}, {mistake}", got[key], twin[key], tolerance)


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
    loss = ClassLoss(ClassLossConfig(scale=16.0, margin=0.3))
    generator = torch.Generator().manual_seed(0)
    negatives_GS = torch.rand(5, 20, generator=generator, dtype=torch.float64) * 2 - 1
    cosines_GP = torch.rand(5, 3, generator=generator, dtype=torch.float64) * 2 - 1
    is_label_GP = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]]).bool()
    parts = loss.parts(torch.logsumexp(16 * negatives_GS, 1), cosines_GP, is_label_GP)
    A_G = torch.exp(16 * negatives_GS).sum(dim=1)
    B_G = (torch.exp(-16 * (cosines_GP - 0.3)) * is_label_GP).sum(dim=1)
    total = parts["negatives"] + parts["positives"]
    # float64 throughout: measured 2e-16
    assert_close("factored", total, torch.log(1 + A_G + B_G + A_G * B_G), 1e-13)
    assert_differs("without the product", total, torch.log(1 + A_G + B_G), 1e-13)
    assert parts["positives"][3] == 0  # an image without a label


@pytest.mark.parametrize("name", ["mlcd", "mlc", "averaged_softmax"])
@pytest.mark.parametrize(
    ("scale", "margin", "form"),
    [(1.0, 0.3, "cosface"), (64.0, 0.99, "cosface"), (75.0, 0.3, "cosface"), (75.0, 0.99, "arcface")],
)
def test_values_and_slopes_are_finite_over_the_whole_range_of_settings(
    name: str, scale: float, margin: float, form: str
) -> None:
    """All cosines 1, all -1, no negative at all, no label at all."""
    loss = ClassLoss(ClassLossConfig(name=name, scale=scale, margin=margin, margin_form=form))
    largest = math.log(4e6) + scale
    negatives_G = torch.tensor([largest, -largest, -math.inf, largest, -math.inf])
    cosines_GP = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    is_label_GP = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0], [0, 0]]).bool()
    parts, slope_G, slopes_GP = loss.slopes(negatives_G, cosines_GP, is_label_GP)
    assert all(torch.isfinite(part).all() and (part >= 0).all() for part in parts.values())
    assert torch.isfinite(slope_G).all() and torch.isfinite(slopes_GP).all()
    assert (slope_G >= 0).all() and (slope_G[[2, 4]] == 0).all(), "no negative, no slope"
    assert (slopes_GP <= 0).all() and (slopes_GP[~is_label_GP] == 0).all()


def one_sided(group: Group) -> list[tuple[str, float, float, float, Tensor, Tensor]]:
    """All embeddings and centres on one line: every cosine is the same."""
    results = []
    for name, scale, cosine in itertools.product(("mlcd", "mlc", "averaged_softmax"), (64.0, 75.0), (-1.0, -0.3, 1.0)):
        loss = ClassLoss(ClassLossConfig(name=name, scale=scale))
        head = PartialFCHead(8, 2, HeadConfig(sample_rate=1.0), loss, make_head_groups(group), 0)
        with torch.no_grad():
            head.weight_LE.copy_(torch.tensor([[1.0, 0.0]]).expand(8, -1))
        head.resample(0)
        emb_B2 = torch.tensor([[cosine, math.sqrt(1 - cosine * cosine)]]).expand(4, -1).contiguous()
        output = head(emb_B2, torch.arange(4)[:, None])
        results.append((name, scale, cosine, output.loss.item(), output.emb_grad_BE, head.grad_LE.clone()))
    return results


def test_equal_cosines_from_end_to_end_of_the_range() -> None:
    """Where all negatives are far, and where all are near, sums and their inverses stay numbers."""
    for name, scale, cosine, loss, emb_grad, weight_grad in run_ranks(one_sided, 1)[0]:
        n, z = scale * cosine + math.log(7), scale * (cosine - 0.3)
        joint = math.log1p(math.exp(n - z))
        expected = math.log1p(math.exp(n)) + math.log1p(math.exp(-z)) if name == "mlcd" else joint
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, scale, cosine)
        slope = 1 / (1 + math.exp(-n)) - 1 / (1 + math.exp(z)) if name == "mlcd" else 0.0
        assert torch.isfinite(weight_grad).all()
        # Negatives and label pull along the same line; in the joint losses they cancel.
        along = torch.tensor([scale * slope / 4, 0.0]).expand(4, -1)
        assert (emb_grad - along).abs().max() <= 1e-5 * scale, (name, scale, cosine, emb_grad)


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValidationError, match="scale"):
        ClassLossConfig(scale=76.0)
    with pytest.raises(ValidationError, match="one label"):
        ClassLossConfig(name="unicom", num_labels=8)
    with pytest.raises(ValidationError, match="drawn_labels is 8: leave it out"):
        ClassLossConfig(name="unicom", drawn_labels=8)
    with pytest.raises(ValidationError, match=r"drawn_labels 9 is more than num_labels 8, .* lower it, or raise"):
        ClassLossConfig(num_labels=8, drawn_labels=9)
    with pytest.raises(
        ValidationError, match=r"separate_samples .* name is mlcd: set separate_samples=false, or name="
    ):
        ClassLossConfig(separate_samples=True)


@pytest.mark.parametrize("scale", [1.0, 64.0, 66.0, 68.0, 70.0, 75.0])
def test_ten_million_classes_stay_numbers_in_fp32(scale: float) -> None:
    shift, limits = ClassLoss(ClassLossConfig(scale=scale)).shift, torch.finfo(torch.float32)
    assert 1e7 * math.exp(scale - shift) * scale < limits.max, "all of them at the image, in the gradient"
    assert math.exp(-scale - shift) > limits.tiny, "the one farthest away"
