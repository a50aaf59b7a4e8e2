"""ProtoCLIP in the whole trainer: any layout trains as one process, and episodes come as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import TinyData, assert_close, run_ranks
from protoclip_trainers import NUM_STEPS, build, go_on, protoclip_of, whole

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.layout import Layout

# By ranks and tensor-parallel size: ZeRO stage, micro-batches.
CASES = {
    (1, 1): ((0, 1), (1, 3)),
    (2, 1): ((1, 1), (3, 3)),
    (4, 2): ((3, 3),),
}
# Measured over all cases: losses 6.4e-7, weights 1.1e-4.
CURVE_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, 1e-3


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
        for case, (curve, _, _, weights, episode) in results.items():
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
