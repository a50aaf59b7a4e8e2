"""How long a training step takes: from the products on a GPU, and from the bytes between GPUs over a bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from mlcd_ds.config import Recipe
from mlcd_ds.engine.hardware import Gpu
from mlcd_ds.engine.layout import Layout
from mlcd_ds.objectives.base import PlannedRun
from mlcd_ds.objectives.registry import kind_of

GPUS_A_NODE = 8
BACKWARD_SHARE = 2 / 3  # of the computing, during which gradients may travel


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
    num_parameters: int,
    num_micro_batches: int,
    micro_batch: int,
    tokens: float,
    gradient_width: int,
    overlaps: bool,
) -> Traffic:
    """What a step sends. `num_parameters` of a rank's layers; `gradient_width` bytes of an element that travels.

    `overlaps`: DeepSpeed's overlap_comm, which stage 0 has not. Below stage 2 gradients travel beside the last
    micro-batch's backward only.

    A ring sends (N - 1) / N of a tensor to gather or scatter it over N ranks, twice as much to sum it for all.
    DeepSpeed sums whole buckets for all at stages 0 to 2, at each micro-batch from stage 2 on; stage 3 scatters the
    sums, and gathers the weights for forward and for backward. The sums between copies of the head (head.parallel_size)
    are left out.
    """
    width = 4 if recipe.train.precision == "fp32" else 2
    stage, ring = layout.zero_stage, 1 - 1 / layout.data_parallel
    reductions = num_micro_batches if stage >= 2 else 1
    gradients = ring * num_parameters * gradient_width * reductions * (1 if stage == 3 else 2)
    weights = ring * num_parameters * width
    # What is sent does not depend on the number of classes.
    run = PlannedRun(layout.num_ranks, layout.tensor_parallel, micro_batch, num_classes=layout.num_ranks)
    sent = kind_of(recipe.objective).need(recipe, run).sent
    sums = 2 * (1 - 1 / layout.tensor_parallel) * tokens * recipe.model.width * width
    within = 4 * recipe.model.depth * sums * micro_batch  # two pairs of products a block, forward and backward
    waited_for = sent * num_micro_batches + (weights if stage in (1, 2) else 0)
    if stage == 3:
        gradients += 2 * weights * num_micro_batches
    elif not (overlaps and stage):
        waited_for, gradients = waited_for + gradients, 0
    share = 1 if stage == 3 else BACKWARD_SHARE * reductions / num_micro_batches
    return Traffic(gradients, share, waited_for, within * num_micro_batches)


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
