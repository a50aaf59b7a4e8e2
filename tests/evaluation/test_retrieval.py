"""Places in retrieval: against sorting in float64, on ranks, with several captions an image and equal similarities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from distributed_harness import run_ranks
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.evaluation.retrieval import RetrievalResult, places, retrieval

NUM_IMAGES, WIDTH = 40, 8


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, captions (one to four an image), and the image of each; embeddings of any length."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, WIDTH, generator=generator)
    owners = torch.arange(NUM_IMAGES).repeat_interleave(torch.randint(1, 5, (NUM_IMAGES,), generator=generator))
    texts = images[owners] + 0.9 * torch.randn(len(owners), WIDTH, generator=generator)
    return images * torch.rand(NUM_IMAGES, 1, generator=generator), texts * 3, owners


def sorted_recall(similarity: Tensor, is_own: Tensor, k: int) -> float:
    """Share of rows with an own item among the first k, by sorting."""
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return float(is_own.gather(1, order).any(1).double().mean())


def expected_report(owners: Tensor | None = None) -> dict[str, float]:
    images, texts, true_owners = pairs()
    is_own = (true_owners if owners is None else owners)[:, None] == torch.arange(NUM_IMAGES)
    similarity = F.normalize(texts.double(), dim=1) @ F.normalize(images.double(), dim=1).T
    ways = {"image": (similarity, is_own), "text": (similarity.T, is_own.T)}
    return {f"{way}_retrieval_recall@{k}": sorted_recall(*ways[way], k) for way in ways for k in (1, 5, 10)}


def test_recalls_are_those_of_sorting() -> None:
    report = retrieval(*pairs()).report()
    assert report.pop("num_images") == NUM_IMAGES and report.pop("num_texts") == len(pairs()[2]) > NUM_IMAGES
    assert report == expected_report() and list(report) == list(expected_report())
    assert 0.1 < report["image_retrieval_recall@1"] < report["image_retrieval_recall@10"] < 1
    assert 0.1 < report["text_retrieval_recall@1"] < report["text_retrieval_recall@10"]
    first_captions = pairs()[2].clone()
    first_captions[1:][first_captions[1:] == first_captions[:-1]] = -1
    assert report != expected_report(first_captions), "known-bad twin: only an image's first caption counts"
    images, texts, owners = pairs()
    assert report != retrieval(images, texts.roll(1, 0), owners).report(), "known-bad twin: captions of others"


@pytest.mark.parametrize("strip", [1, 100, 10**6])
def test_strips_change_nothing(strip: int) -> None:
    images, texts, owners = (F.normalize(rows, dim=1) if rows.is_floating_point() else rows for rows in pairs())
    found = places(texts, owners, images, torch.arange(NUM_IMAGES), strip)
    assert torch.equal(found, retrieval(*pairs()).images_of_text_T)


def test_equal_similarities_stand_in_the_gallerys_order() -> None:
    """Two images alike: the first is found at 1, the second at 2; of captions that are alike any own one counts."""
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    texts, owners = images[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 2])
    found = retrieval(images, texts, owners)
    assert found.images_of_text_T.tolist() == [0, 1, 0, 0] and found.texts_of_image_N.tolist() == [0, 1, 0]


def test_what_cannot_be_measured() -> None:
    images, texts, owners = pairs()
    with pytest.raises(ValueError, match="images 0 to 39"):
        retrieval(images, texts[owners != 3], owners[owners != 3])
    with pytest.raises(ValueError, match="NaN"):
        retrieval(images.index_fill(0, torch.tensor(2), math.nan), texts, owners)
    with pytest.raises(ValueError, match="nothing in the gallery"):
        places(texts[:1], torch.tensor([99]), images, torch.arange(NUM_IMAGES))


class SilentRanks(Ranks):
    """Known-bad twin: each rank keeps its own rows."""

    def concat(self, rows_n: Tensor) -> Tensor:
        return rows_n


def on_ranks(group: Group) -> tuple[RetrievalResult, dict]:
    return retrieval(*pairs(), Ranks(group)), retrieval(*pairs(), SilentRanks(group)).report()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_find_what_one_process_does(num_ranks: int) -> None:
    expected = retrieval(*pairs())
    for found, bad in run_ranks(on_ranks, num_ranks):
        assert torch.equal(found.images_of_text_T, expected.images_of_text_T)
        assert torch.equal(found.texts_of_image_N, expected.texts_of_image_N)
        assert found.report() == expected.report() != bad
