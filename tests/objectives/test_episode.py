"""How an episode's clusters become prototypes, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.clustering.memory_rows import Share, cluster_rows
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.episode import Clusterer, Episode, load_state, save_state

DIM = 5


def blobs(num_rows: int, num_blobs: int, seed: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(num_blobs, DIM, generator=generator)
    rows = middles[torch.arange(num_rows) * 7 % num_blobs] + spread * torch.randn(num_rows, DIM, generator=generator)
    return F.normalize(rows)


def make_episode(group: Group, num_clusters: int, spread: float, has_back_translation: bool = True) -> Episode:
    num_rows, num_blobs = 101, 6  # divided by no number of ranks
    rows = {name: blobs(num_rows, num_blobs + place, place, spread) for place, name in enumerate(("image", "text"))}
    external = 5 * blobs(num_rows, 4, 9, spread)
    share = Share.of(num_rows, group)
    own = slice(share.first, share.first + share.count)
    clusterer = Clusterer(num_clusters, 20, 3, has_back_translation, 0, group, None)
    return clusterer.make(
        2, torch.arange(num_rows), {name: part[own].clone() for name, part in rows.items()}, external[own].clone()
    )


def make_episodes(group: Group) -> dict[str, Episode]:
    return {
        "apart": make_episode(group, 6, 0.05),
        "copies": make_episode(group, 20, 0.0),
        "as they are": make_episode(group, 6, 0.05, has_back_translation=False),
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Episode]:
    return run_ranks(make_episodes, 1)[0]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_episode_is_the_same_on_any_number_of_ranks(expected: dict[str, Episode], num_ranks: int) -> None:
    ranks = [expected, *run_ranks(make_episodes, num_ranks)]
    students = {name: blobs(101, 6 + place, place, 0.05).double() for place, name in enumerate(("image", "text"))}
    for episodes in ranks:
        for case, episode in episodes.items():
            assert episode.labels.keys() == {"image", "text", "external"}
            # Of copies a centre's last split may be of another one.
            is_compared = episodes is not expected and case != "copies"
            for name, tensor in expected[case].tensors().items() if is_compared else ():
                if name.startswith("labels"):
                    assert torch.equal(episode.tensors()[name], tensor), f"{case}: {name}"
                else:
                    assert_close(f"{case}: {name}", episode.tensors()[name].double(), tensor.double(), 1e-5)
        episode = episodes["apart"]
        for pair, prototypes_KP in episode.prototypes.items():
            student, teacher = pair.split("/")
            labels_N = episode.labels[teacher]
            means = [students[student][labels_N == k].mean(dim=0) for k in range(len(prototypes_KP))]
            assert_close(pair, prototypes_KP, torch.stack(means), 1e-6)
            if teacher != "external":  # known-bad: the student's own clusters
                twin = torch.stack([students[student][episode.labels[student] == k].mean(dim=0) for k in range(6)])
                assert_differs(f"{pair} of its own", prototypes_KP, twin, 1e-3)
        plain = episodes["as they are"]
        assert not plain.prototypes and plain.prototypes_of("image", "text") is plain.centers["text"]


def test_clusters_without_a_sample_are_dropped(expected: dict[str, Episode]) -> None:
    episode = expected["copies"]
    for teacher, count in (("image", 6), ("text", 7), ("external", 4)):
        labels_N, centers_KP = episode.labels[teacher], episode.centers[teacher]
        assert len(centers_KP) <= count, "no more clusters than different rows"
        assert sorted(labels_N.unique().tolist()) == list(range(len(centers_KP))), "each of those left has a sample"
        assert episode.empty[teacher].item() == pytest.approx(1 - len(centers_KP) / 20)
    for pair, prototypes_KP in episode.prototypes.items():
        assert prototypes_KP.isfinite().all() and (prototypes_KP.norm(dim=1) > 0.1).all(), pair


def test_restarts_take_the_best() -> None:
    rows = blobs(300, 40, 3, 0.3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = Group(dist.group.WORLD)
        share = Share.of(len(rows), group)
        single = [cluster_rows(rows, share, group, 40, 6, [seed])[0].objective[-1] for seed in range(4)]
        best, labels_N = cluster_rows(rows, share, group, 40, 6, [0, 1, 2, 3])
    finally:
        dist.destroy_process_group()
    assert best.objective[-1] == pytest.approx(min(single), rel=2e-5) and max(single) > 1.001 * min(single)
    assert torch.equal(labels_N, torch.cdist(rows, best.centers_CE).argmin(dim=1))


@pytest.mark.parametrize("case", ["apart", "as they are"])
def test_an_episode_is_read_back_as_it_was(expected: dict[str, Episode], case: str, tmp_path: Path) -> None:
    episode = expected[case]
    save_state(tmp_path, episode.tensors())
    again = Episode.of_tensors(load_state(tmp_path), lambda number: torch.arange(101) + number - 2, "here")
    assert again.number == 2 and torch.equal(again.ids_N, torch.arange(101))
    for name, tensor in episode.tensors().items():
        assert torch.equal(again.tensors()[name], tensor) and again.tensors()[name].dtype == tensor.dtype
    with pytest.raises(UserError, match="is of another objective"):
        Episode.of_tensors(load_state(tmp_path), lambda number: torch.arange(100), "here")
