"""Zero-shot hits: against the definition in float64, on ranks, in a crafted case of equal similarities; prompts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.prompts import NAMED_TEMPLATES, filled, read_names, read_templates
from mlcd_ds.evaluation.ranks import ALONE, Ranks
from mlcd_ds.evaluation.zeroshot import ZeroShotHits, class_embeddings, zeroshot_hits, zeroshot_result

NAMES = [f"class {number}" for number in range(7)]
TEMPLATES = ["a photo of a {}.", "{}!", "many {} and {}"]
WIDTH = 12


def encode_texts(texts: list[str]) -> Tensor:
    """Embeddings of very different lengths that depend on the text alone."""
    rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, t)) * len(t))) for t in texts]
    return torch.stack([row * (1 + len(text)) for row, text in zip(rows, texts, strict=True)])


def oracle_classes(is_normalised: bool = True) -> Tensor:
    """float64, text by text."""
    means = []
    for name in NAMES:
        rows = [encode_texts([template.replace("{}", name)])[0].double() for template in TEMPLATES]
        means.append(sum(row / row.norm() if is_normalised else row for row in rows) / len(rows))
    return torch.stack([mean / mean.norm() for mean in means])


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(7, (90,), generator=generator)
    rows = oracle_classes()[labels] + 0.8 * torch.randn(90, WIDTH, generator=generator)
    return (rows * torch.rand(90, 1, generator=generator)).float(), labels


def oracle_places(classes: Tensor) -> list[int]:
    rows, labels = images()
    found = []
    for row, label in zip(rows.double(), labels.tolist(), strict=True):
        similarity = (classes @ (row / row.norm())).tolist()
        found.append(sum(value > similarity[label] for value in similarity))
    return found


@pytest.mark.parametrize("texts_a_batch", [1, 7, 1000])
def test_classes_and_hits_are_those_of_the_definition(texts_a_batch: int) -> None:
    classes = class_embeddings(encode_texts, NAMES, TEMPLATES, texts_a_batch=texts_a_batch)
    assert_close("classes", classes, oracle_classes(), 1e-6)  # measured 1e-7
    assert_differs("texts that are not of unit length", classes, oracle_classes(False), 1e-6)
    rows, labels = images()
    hits = zeroshot_hits(rows, labels, classes)
    assert hits.places_N.tolist() == oracle_places(oracle_classes()) != oracle_places(oracle_classes(False))
    result = zeroshot_result(hits, labels, 7)
    report = result.report()
    expected = [sum(place < k for place in oracle_places(oracle_classes())) for k in (1, 5)]
    assert [report["num_hits1"], report["num_hits5"]] == expected and 30 < expected[0] < expected[1] < 90
    assert report["acc1"] == expected[0] / 90 and report["chance"] == 1 / 7
    of_class = [[p == 0 for p, y in zip(hits.places_N, labels, strict=True) if y == label] for label in range(7)]
    assert report["mean_per_class_recall"] == pytest.approx(sum(sum(c) / len(c) for c in of_class) / 7)
    assert report["largest_class"] == max(len(c) for c in of_class) / 90
    assert torch.equal(hits.predictions_N == labels, hits.places_N == 0)
    assert torch.equal(hits.margins_N < 0, hits.places_N == 0)


def test_equal_similarities_stand_in_the_order_of_the_classes() -> None:
    """As argmax has it: a class that is named twice hits by its first name alone."""
    classes = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    rows = torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.0, 0.1]])
    hits = zeroshot_hits(rows, torch.tensor([0, 1, 2]), classes)
    assert hits.places_N.tolist() == [0, 1, 2] and hits.predictions_N.tolist() == [0, 0, 0]
    assert hits.num_hits(1) == 1 and hits.num_hits(2) == 2 and hits.num_hits(3) == 3
    report = zeroshot_result(hits, torch.tensor([0, 1, 2]), 3).report()
    assert report["acc5"] is report["num_hits5"] is None, "five of three classes"


def test_what_is_not_finite_is_no_hit() -> None:
    classes = torch.eye(3)
    with pytest.raises(ValueError, match="NaN"):
        zeroshot_hits(torch.full((2, 3), math.nan), torch.tensor([0, 1]), classes)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        zeroshot_hits(torch.ones(2, 3), torch.tensor([0, 3]), classes)


class SilentRanks(Ranks):
    """Known-bad twin: each rank keeps its own rows."""

    def concat(self, rows_n: Tensor) -> Tensor:
        return rows_n


def on_ranks(group: Group) -> tuple[Tensor, ZeroShotHits, int]:
    ranks = Ranks(group)
    rows, labels = images()
    own = ranks.share(len(rows))
    classes = class_embeddings(encode_texts, NAMES, TEMPLATES, ranks)
    few = class_embeddings(encode_texts, NAMES[:1], TEMPLATES, ranks)
    assert torch.equal(few, class_embeddings(encode_texts, NAMES[:1], TEMPLATES))
    bad = zeroshot_hits(rows[own], labels[own], classes, SilentRanks(group))
    return classes, zeroshot_hits(rows[own], labels[own], classes, ranks), bad.num_hits(1)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_find_what_one_process_does(num_ranks: int) -> None:
    classes = class_embeddings(encode_texts, NAMES, TEMPLATES, ALONE)
    expected = zeroshot_hits(*images(), classes)
    for theirs, hits, num_own in run_ranks(on_ranks, num_ranks):
        assert torch.equal(theirs, classes)
        assert torch.equal(hits.places_N, expected.places_N) and num_own != expected.num_hits(1)
        assert torch.equal(hits.predictions_N, expected.predictions_N)


# Names and templates


def test_templates_of_clip() -> None:
    counts = {name: read_templates(name) for name in NAMED_TEMPLATES}
    assert [len(found) for found in counts.values()] == [80, 7] and set(counts["clip_7"]) < set(counts["clip_80"])
    for found in counts.values():
        assert len(set(found)) == len(found) and all(template.count("{}") == 1 for template in found)
    assert filled("a {} and a {}", "b{}") == "a b{} and a b{}" and filled("{}", "{0.__class__}") == "{0.__class__}"


def test_templates_and_names_of_clip_benchmark(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("a {c}\n\nthe {}\n")
    assert read_templates(str(tmp_path / "templates.txt")) == ["a {}", "the {}"]
    (tmp_path / "classnames.txt").write_text("tench\ngreat white shark\n")
    assert read_names(tmp_path / "classnames.txt") == ["tench", "great white shark"]
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert read_names(tmp_path / "classes.json") == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a {}\nno place\n", "template 2, 'no place'"),
        ("a {name}\n", "template 1, 'a {name}'"),
        ("{} {0}", "template 1"),
        ("\n", "no template"),
    ],
)
def test_templates_that_take_no_name_are_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_templates(str(tmp_path / "t.txt"))
    assert told in str(caught.value) and str(tmp_path / "t.txt") in str(caught.value)


def test_other_files_are_named(tmp_path: Path) -> None:
    for content, told in (
        ("[]", "no list"),
        ('{"a": 0}', "no list"),
        ('["a", 3]', "label 1"),
        ('["a", " "]', "label 1"),
    ):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(UserError, match=told):
            read_names(tmp_path / "classes.json")
    with pytest.raises(UserError, match="clip_80, clip_7"):
        read_templates("clip_9")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_templates(str(tmp_path / "bytes.txt"))
