"""How long a training step takes: from the products on a GPU, and from the bytes between GPUs over a bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlcd_ds.config import Recipe
from mlcd_ds.engine.hardware import Gpu
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.phases import phases
from mlcd_ds.engine.planned_towers import PlannedTower, planned_towers
from mlcd_ds.models.layers import Recompute
from mlcd_ds.objectives.base import PlannedRun
from mlcd_ds.objectives.registry import kind_of

GPUS_A_NODE = 8


@dataclass(frozen=True)
class TowerWork:
    """What a tower does for one sample in a step: tokens, and operations of a forward pass, of the backward pass and of
    what it computes again; means over the phases. `num_forwards`: two of a trained tower where the objective must see
    all micro-batches at once, and there are several."""

    tower: PlannedTower
    tokens: float
    forward: float
    num_forwards: int
    backward: float
    recomputed: float

    @property
    def flops(self) -> float:
        """All of it."""
        return self.num_forwards * self.forward + self.backward + self.recomputed

    def flops_on_rank(self, tensor_parallel: int) -> float:
        """A tensor-parallel group shares the work of a trained tower; each of its ranks runs a frozen one."""
        return self.flops if self.tower.is_frozen else self.flops / tensor_parallel


def step_work(recipe: Recipe, recompute: Recompute, num_micro_batches: int) -> list[TowerWork]:
    """Of each tower."""
    is_repeated = kind_of(recipe.objective).sees_whole_batch(recipe) and num_micro_batches > 1
    by_phase = [(planned_towers(recipe, phase), phase.end - phase.begin) for phase in phases(recipe)]

    def mean(number: int, value: Callable[[PlannedTower], int]) -> float:
        return sum(value(towers[number]) * steps for towers, steps in by_phase) / recipe.train.steps

    found = []
    for number, tower in enumerate(by_phase[-1][0]):
        forward = mean(number, lambda tower: tower.forward_flops)
        again = {"none": 0.0, "mlp": mean(number, lambda tower: tower.mlp_flops), "block": forward}[recompute]
        is_trained = not tower.is_frozen
        found.append(
            TowerWork(
                tower,
                tokens=mean(number, lambda tower: tower.tokens),
                forward=forward,
                num_forwards=2 if is_repeated and is_trained else 1,
                backward=2 * forward if is_trained else 0.0,
                recomputed=again if is_trained else 0.0,
            )
        )
    return found


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, by whether the step waits for them.

    `hidden` travels while `hiding_share` of the step's computing goes on. `within_node` are the tensor-parallel sums,
    which go over a node's own links, and are waited for like `waited_for`.
    """

    hidden: float
    hiding_share: float
    waited_for: float
    within_node: float


def traffic(
    recipe: Recipe,
    layout: Layout,
    work: Sequence[TowerWork],
    num_micro_batches: int,
    micro_batch: int,
    gradient_width: int,
    overlaps: bool,
) -> Traffic:
    """What a step sends; of frozen towers nothing. `gradient_width`: bytes of an element that travels.

    `overlaps`: DeepSpeed's overlap_comm, which stage 0 has not. Below stage 2 gradients travel beside the last
    micro-batch's backward only.

    A ring sends (N - 1) / N of a tensor to gather or scatter it over N ranks, twice as much to sum it for all.
    DeepSpeed sums whole buckets for all at stages 0 to 2, at each micro-batch from stage 2 on; stage 3 scatters the
    sums, and gathers the weights for each forward and for backward. The sums between copies of the head
    (head.parallel_size) are left out.
    """
    width = 4 if recipe.train.precision == "fp32" else 2
    stage, ring, size = layout.zero_stage, 1 - 1 / layout.data_parallel, layout.tensor_parallel
    trained = [part for part in work if not part.tower.is_frozen]
    num_parameters = sum(part.tower.num_on_rank(size) for part in trained)
    num_forwards = max(part.num_forwards for part in trained)
    reductions = num_micro_batches if stage >= 2 else 1
    gradients = ring * num_parameters * gradient_width * reductions * (1 if stage == 3 else 2)
    weights = ring * num_parameters * width
    # What is sent does not depend on the number of classes.
    run = PlannedRun(layout.num_ranks, size, micro_batch, num_classes=layout.num_ranks)
    sent = kind_of(recipe.objective).need(recipe, run).sent
    # Two pairs of products a block, in each forward pass and in backward.
    num_sums = 2 * (num_forwards + 1)
    summed = sum(part.tokens * part.tower.config.width * part.tower.config.depth for part in trained) * width
    within = num_sums * 2 * (1 - 1 / size) * summed * micro_batch
    waited_for = sent * num_micro_batches + (weights if stage in (1, 2) else 0)
    if stage == 3:
        gradients += (num_forwards + 1) * weights * num_micro_batches
    elif not (overlaps and stage):
        waited_for, gradients = waited_for + gradients, 0
    share = 1.0 if stage == 3 else backward_share(work, size) * reductions / num_micro_batches
    return Traffic(gradients, share, waited_for, within * num_micro_batches)


def backward_share(work: Sequence[TowerWork], tensor_parallel: int) -> float:
    """The part of the computing during which gradients may travel; what is recomputed is not counted."""
    scale = [1 if part.tower.is_frozen else 1 / tensor_parallel for part in work]
    backward = sum(part.backward * factor for part, factor in zip(work, scale, strict=True))
    forward = sum(part.num_forwards * part.forward * factor for part, factor in zip(work, scale, strict=True))
    return backward / (forward + backward)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: computing, all communication, and the part of it that computing does not hide."""

    computing: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.computing + self.exposed


def step_time(computing: float, sent: Traffic, gpu: Gpu, num_ranks: int, between_gb: float | None = None) -> StepTime:
    """`between_gb`: GB/s a GPU between nodes, where it is not the table's. Latencies are left out."""
    within = gpu.within_gb * 1e9
    between = within if num_ranks <= GPUS_A_NODE else (between_gb or gpu.between_gb) * 1e9
    hidden, waited_for = sent.hidden / between, sent.waited_for / between + sent.within_node / within
    return StepTime(computing, hidden + waited_for, waited_for + max(0.0, hidden - computing * sent.hiding_share))
