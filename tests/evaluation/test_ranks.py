"""kNN and the linear probe of samples that are dealt over ranks, against one process; some ranks have none."""

from __future__ import annotations

import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.evaluation.knn import weighted_knn
from mlcd_ds.evaluation.linear_probe import ProbeResult, linear_probe
from mlcd_ds.evaluation.logistic import fit_logistic
from mlcd_ds.evaluation.ranks import ALONE, Ranks

NUM_CLASSES = 4
KS = (1, 5, 20)


def samples(num: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means = 0.4 * torch.randn(NUM_CLASSES, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    return means[labels] + torch.randn(num, width, generator=generator), labels


class UnsummedGradients(Ranks):
    """Known-bad twin: what has a class's shape, the gradients and curvatures, is this rank's alone."""

    def sum(self, values: Tensor) -> Tensor:
        return values if values.ndim == 2 else super().sum(values)


def dealt(rows: tuple[Tensor, Tensor], ranks: Ranks, is_uneven: bool) -> tuple[Tensor, Tensor]:
    """This rank's consecutive part; unevenly: the first and the last rank have all, half each."""
    part = ranks.share(len(rows[0]))
    if is_uneven:
        half = len(rows[0]) // 2
        part = slice(half * (ranks.rank > 0), half if ranks.rank < ranks.size - 1 else None)
        part = part if ranks.rank in (0, ranks.size - 1) else slice(0, 0)
    return rows[0][part], rows[1][part]


def probe_of(ranks: Ranks, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], uneven: bool) -> ProbeResult:
    own = (*dealt(train, ranks, uneven), *dealt(test, ranks, uneven))
    generator = torch.Generator().manual_seed(0)
    return linear_probe(*own, NUM_CLASSES, generator, 2, max_iterations=30, ranks=ranks)


def fit_of(ranks: Ranks, train: tuple[Tensor, Tensor]) -> Tensor:
    features, labels = dealt(train, ranks, False)
    fit = fit_logistic(features.double(), labels, NUM_CLASSES, 0.1, tolerance=1e-10, max_iterations=30, ranks=ranks)
    return torch.cat([fit.weight_CD.flatten(), fit.bias_C, torch.tensor([fit.objective]).double()])


def measured(group: Group, width: int, uneven: bool) -> dict[str, object]:
    ranks, train, test = Ranks(group), samples(150, width, 0), samples(67, width, 1)
    own = (*dealt(train, ranks, uneven), *dealt(test, ranks, uneven))
    rows = torch.full((2 * ranks.rank, 3), float(ranks.rank))
    return {
        "knn": weighted_knn(*own, NUM_CLASSES, KS, block=16, ranks=ranks),
        "probe": probe_of(ranks, train, test, uneven),
        "fit": fit_of(ranks, train),
        "bad fit": fit_of(UnsummedGradients(group), train),
        "rows": (ranks.concat(rows)[:, 0].tolist(), ranks.counts(len(rows)), ranks.share(10)),
        "agreed": (ranks.agree(5.0 + ranks.rank), ranks.from_first(torch.tensor([7.0 + ranks.rank])).item()),
    }


@pytest.mark.parametrize(("num_ranks", "width", "uneven"), [(2, 200, False), (3, 10, True)])
def test_ranks_measure_what_one_process_does(num_ranks: int, width: int, uneven: bool) -> None:
    """200 channels are more than the 150 training samples; unevenly dealt, a rank has none."""
    train, test = samples(150, width, 0), samples(67, width, 1)
    knn = weighted_knn(*train, *test, NUM_CLASSES, KS)
    probe, fit = probe_of(ALONE, train, test, False), fit_of(ALONE, train)
    for rank, found in enumerate(run_ranks(measured, num_ranks, width, uneven)):
        assert found["knn"] == knn
        theirs = found["probe"]
        assert torch.equal(theirs.predictions_SM, probe.predictions_SM)
        assert [split.l2 for split in theirs.splits] == [split.l2 for split in probe.splits]
        assert theirs.accuracy_se == pytest.approx(probe.accuracy_se) and theirs.num_unconverged == 0
        assert_close("weights, bias and objective", found["fit"], fit, 1e-8)  # measured 1e-16
        assert_differs("gradients of a rank's own samples", found["bad fit"], fit, 1e-8)
        in_order, counts = [1.0] * 2 + [2.0] * 4, [0, 2, 4]
        share = slice(10 * rank // num_ranks, 10 * (rank + 1) // num_ranks)
        assert found["rows"] == (in_order[: 2 if num_ranks == 2 else 6], counts[:num_ranks], share)
        assert found["agreed"] == (5.0, 7.0), "rank 0's"


def test_shares_are_all_rows() -> None:
    assert ALONE.share(10) == slice(0, 10) and ALONE.counts(3) == [3] and ALONE.agree(2.0) == ALONE.total(2.0) == 2.0
