"""ProtoCLIP in the whole trainer: any layout trains as one process, and episodes come as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_harness import TinyData, assert_close, assert_differs, run_ranks
from protoclip_trainers import NUM_STEPS, build, go_on, protoclip_of
from torch import Tensor
from trainers import whole

from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.clustering.memory_rows import Share
from mlcd_ds.clustering.principal import principal_components
from mlcd_ds.data.dali import EvaluationDecoder
from mlcd_ds.data.loader import shard_images
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.layout import Layout
from mlcd_ds.objectives import projection_heads
from mlcd_ds.objectives.protoclip import ProtoClip

# By ranks and tensor-parallel size: ZeRO stage, micro-batches.
CASES = {
    (1, 1): ((0, 1), (1, 3)),
    (2, 1): ((1, 1), (3, 3)),
    (4, 2): ((3, 3),),
}
# Measured over all cases: losses 6.4e-7, weights 1.1e-4.
CURVE_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, 1e-3


def own_moments(values: Tensor, group: Group) -> Tensor:
    """The known-bad twin of the heads' sums over ranks: as if all ranks had this one's images."""
    return values * group.size


def features_of(group: Group, data: TinyData, folder: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of an episode's samples: as read for it; image by image, in the order of the index, and then sorted; unsorted."""
    trainer = build(data, folder / "features", Layout(group.size, 1, 1), group, 2)
    objective, index = protoclip_of(trainer), ShardIndex(data.index)
    trainer.step(0, trainer.batches(0))
    number, outputs = 3, trainer.own_outputs()
    drawn = torch.from_numpy(ProtoClip.sample_order(trainer.recipe, trainer.data.counts).episode(number)[0])
    share = Share.of(len(drawn), group)
    own = slice(share.first, share.first + share.count)
    found = {}
    images = list(shard_images(index, 0, EvaluationDecoder(10, clip_pixels(32), torch.device("cpu"), 1)))
    rows = np.arange(index.num_images)
    tokens = trainer.data.fields["tokens"].read(0 * rows, rows, 0 * rows)
    read = objective.features(number, trainer.embed, trainer.own_outputs)
    for tower, given in (("image", torch.cat(images)), ("text", torch.from_numpy(tokens))):
        all_NP = objective.terms.project(tower, trainer.embed(tower, given, is_projected=True), outputs)
        found[tower] = read[tower], all_NP[drawn.sort().values][own], all_NP[drawn][own]
    teacher = EmbeddingStore(data.embeddings).read(rows)
    external = objective.reader.external(number, 5)
    assert external is not None
    expected, twin = (
        share.gather(principal_components(teacher[ids][own], len(ids), 5, group), group)
        for ids in (drawn.sort().values, drawn)
    )
    found["external"] = share.gather(external, group), expected, twin
    trainer.engine.destroy()
    return found


def check_features(features: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    for name, (got, right, twin) in features.items():
        assert_close(name, got, right, 1e-5)
        assert_differs(f"{name}, unsorted", got, twin, 1e-3)


def train_all(group: Group, data: TinyData, folder: Path, tensor_parallel: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for stage, micro_batches in CASES[group.size, tensor_parallel]:
        layout = Layout(group.size, tensor_parallel, stage)
        trainer = build(data, folder / f"{stage}-{micro_batches}", layout, group, micro_batches)
        begin = whole(trainer)
        curve = go_on(trainer, 0, 6)
        episode = protoclip_of(trainer).episode
        assert episode
        middle = whole(trainer)
        curve = torch.cat([curve, go_on(trainer, 6, NUM_STEPS)])
        found[stage, micro_batches] = curve, begin, middle, whole(trainer), episode.tensors()
        trainer.engine.destroy()
    if group.size <= 2:
        found["features"] = features_of(group, data, folder)
    if group.size == 2:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(projection_heads._SumOverRanks, "apply", own_moments)
            trainer = build(data, folder / "twin", Layout(group.size, 1, 1), group, 1)
            found["twin"] = go_on(trainer, 0, 4)
            trainer.engine.destroy()
    return found


@pytest.fixture(scope="module")
def expected(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return run_ranks(train_all, 1, tiny_data, tmp_path_factory.mktemp("one"), 1)[0]


@pytest.mark.parametrize(("num_ranks", "tensor_parallel"), list(CASES))
def test_a_layout_trains_as_one_process(
    expected: dict[Any, Any], tiny_data: TinyData, tmp_path: Path, num_ranks: int, tensor_parallel: int
) -> None:
    ranks = [expected]
    if num_ranks > 1:
        ranks = run_ranks(train_all, num_ranks, tiny_data, tmp_path, tensor_parallel, timeout_s=600)
    right_curve, _, _, right_weights, right_episode = expected[0, 1]
    for results in ranks:
        if "twin" in results:
            assert_differs("moments of a rank", results.pop("twin")[:, 2], right_curve[:4, 2], CURVE_TOLERANCE)
        if "features" in results:
            check_features(results["features"])
        cases = {case: value for case, value in results.items() if isinstance(case, tuple)}
        for case, (curve, _, _, weights, episode) in cases.items():
            if curve is right_curve:
                continue
            for column, value in enumerate(("loss", "clip", "proto", "external", "scale")):
                assert_close(f"{case}: {value}", curve[:, column], right_curve[:, column], CURVE_TOLERANCE)
            for name, weight in right_weights.items():
                if not name.endswith("k_proj.bias"):  # no gradient there but rounding
                    assert_close(f"{case}: {name}", weights[name], weight, WEIGHT_TOLERANCE)
            for name, tensor in right_episode.items():
                if name.startswith("labels"):
                    assert torch.equal(episode[name], tensor), f"{case}: {name}"


def test_features_are_of_the_episodes_samples_in_the_order_of_the_index(expected: dict[Any, Any]) -> None:
    """On one rank; the same on two are compared with the layout."""
    check_features(expected["features"])


def test_episodes_come_as_planned(expected: dict[Any, Any]) -> None:
    curve, begin, middle, end, episode = expected[0, 1]
    assert not curve[:2, 2:4].any() and not curve[6:, 2:4].any(), "CLIP's loss alone, first and last"
    assert (curve[2:6, 2:4] > 0.5).all()
    assert_close("weighted sum", curve[:, 0], curve[:, 1:4].sum(dim=1), 1e-6)
    assert int(episode["number"]) == 2
    heads = [name for name in begin if name.startswith("objective.heads.image_")]
    assert len(heads) == 5
    for name in begin:
        is_image = not name.startswith(("objective.", "text."))
        assert torch.equal(middle[name], end[name]) == is_image, f"{name}: the image tower stays, the rest goes on"
        if not name.endswith("k_proj.bias"):
            assert not torch.equal(begin[name], middle[name]), name
    for name in heads:
        assert torch.equal(begin[name], begin[name.replace("image_", "text_")])
        assert not torch.equal(end[name], end[name.replace("image_", "text_")])
