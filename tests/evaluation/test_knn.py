import math

import pytest
import torch
from torch import Tensor

from mlcd_ds.evaluation.knn import usable_ks, weighted_knn


def naive_knn(train: Tensor, labels: Tensor, test: Tensor, k: int, temperature: float, weighted: bool) -> list[int]:
    """Predictions by loops over Python floats."""
    predictions = []
    for query in test.tolist():
        similarities = []
        for example, label in zip(train.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, example, strict=True))
            similarities.append((dot / (math.hypot(*query) * math.hypot(*example)), label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + (math.exp(similarity / temperature) if weighted else 1.0)
        predictions.append(max(votes, key=lambda label: votes[label]))
    return predictions


def accuracy(predictions: list[int], labels: Tensor) -> float:
    return sum(p == label for p, label in zip(predictions, labels.tolist(), strict=True)) / len(labels)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 12, generator=generator)
    labels, test_labels = (torch.randint(5, (n,), generator=generator) for n in (150, 67))
    train, test = (means[y] + 1.3 * torch.randn(len(y), 12, generator=generator) for y in (labels, test_labels))
    return train * torch.rand(150, 1, generator=generator), labels, test, test_labels


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_equals_the_naive_oracle(data: tuple[Tensor, Tensor, Tensor, Tensor], block: int) -> None:
    train, labels, test, test_labels = data
    ks = (1, 3, 10, 150)
    ours = weighted_knn(train, labels, test, test_labels, 5, ks, block=block)
    assert ours == {k: accuracy(naive_knn(train, labels, test, k, 0.07, True), test_labels) for k in ks}
    assert 0.4 < ours[10] < 1.0
    for temperature, weighted in ((0.07, False), (5.0, True)):
        bad = {k: accuracy(naive_knn(train, labels, test, k, temperature, weighted), test_labels) for k in ks}
        assert bad != ours, "known-bad twin: unweighted, or another temperature"


def test_weights_decide_a_crafted_case() -> None:
    """One near neighbour of class 0 outvotes two far ones of class 1 at T = 0.07, not when they count alike."""
    angles = torch.tensor([0.1, 1.0, -1.0])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, test, test_labels = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    assert weighted_knn(train, labels, test, test_labels, 2, ks=(3,)) == {3: 1.0}
    assert weighted_knn(train, labels, test, test_labels, 2, ks=(3,), temperature=10.0) == {3: 0.0}
    assert naive_knn(train, labels, test, 3, 0.07, weighted=False) == [1]
    assert weighted_knn(train, labels, test, test_labels, 2, ks=(3,), temperature=1e-4) == {3: 1.0}, "overflow"


def test_errors_name_the_value(data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train, labels, test, test_labels = data
    assert usable_ks(150) == (10, 20, 100) and usable_ks(5) == ()
    with pytest.raises(ValueError, match=r"200.*150"):
        weighted_knn(train, labels, test, test_labels, 5)
    with pytest.raises(ValueError, match="ks"):
        weighted_knn(train, labels, test, test_labels, 5, usable_ks(5))
    with pytest.raises(ValueError, match="train: labels"):
        weighted_knn(train, labels, test, test_labels, 4, (1,))
    with pytest.raises(ValueError, match="test: 1 rows"):
        weighted_knn(train, labels, test.index_fill(0, torch.tensor(3), math.nan), test_labels, 5, (1,))
    with pytest.raises(ValueError, match="temperature"):
        weighted_knn(train, labels, test, test_labels, 5, (1,), temperature=0.0)
