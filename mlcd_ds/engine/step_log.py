"""Turns the results of steps into log entries, each of which covers the steps since the last entry."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from mlcd_ds.config import Recipe, dump_recipe
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import EngineState
from mlcd_ds.engine.hardware import peak_tflops
from mlcd_ds.engine.monitors import Monitor
from mlcd_ds.engine.phases import phase_at
from mlcd_ds.engine.planned_towers import model_flops
from mlcd_ds.engine.run_log import RunLog, log_data_pages, peak_memory_mb
from mlcd_ds.engine.step_clock import StepClock
from mlcd_ds.objectives.base import Objective


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: means over the global batch, gradient norms before clipping. Tensors, no host sync."""

    loss: Tensor
    loss_parts: dict[str, Tensor]
    backbone_grad_norm: Tensor | float | None
    measures: dict[str, Tensor]  # what the objective's own step tells, and the embeddings' lengths
    lr: float


@dataclass(frozen=True)
class _Since:
    """The last entry: its time by `time.perf_counter`, and the steps and backbone updates done by then."""

    moment: float
    step: int
    num_updates: int


def with_page(name: str) -> str:
    """A measure's name with its TensorBoard page: the optimizer's, where it names none."""
    return name if "/" in name else f"optimizer/{name}"


class StepLog:
    """Entries and progress bar, on rank 0; the other ranks only join where all ranks are needed."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        state: EngineState,
        objective: Objective,
        clock: StepClock,
        group: Group,
        device: torch.device,
        first: int,
    ) -> None:
        self._recipe, self._num_samples, self._group, self._device = recipe, data.num_samples, group, device
        self._state, self._objective, self._clock = state, objective, clock
        self._log = RunLog(recipe.train.out, first) if group.is_main else None
        if self._log and first == 0:
            log_data_pages(self._log, data, dump_recipe(recipe))
        steps = recipe.train.steps
        is_quiet = not (group.is_main and sys.stderr.isatty())
        self.steps = tqdm(range(first, steps), initial=first, total=steps, unit="step", desc="train", disable=is_quiet)
        self._since = _Since(time.perf_counter(), first, state.num_updates)

    def add(self, done: int, result: StepResult) -> None:
        """An entry after `done` steps. The host waits for the device, on all ranks."""
        since, times, waited_s = self._since, self._clock.read(), self._clock.take_wait()
        counts = self._objective.take_counts()
        self._since = _Since(time.perf_counter(), done, self._state.num_updates)
        if self._log is None:
            return
        recipe, phase, num_steps = self._recipe, phase_at(self._recipe, done - 1), done - since.step
        seconds, num_updates = self._since.moment - since.moment, self._since.num_updates - since.num_updates
        images_per_s = num_steps * recipe.train.global_batch / seconds
        tflops = images_per_s * model_flops(recipe, phase) / self._group.size / 1e12
        peak, scale = peak_tflops(self._device), self._state.loss_scale
        self._log.scalars(
            done,
            {
                "loss/total": float(result.loss),
                **{f"loss/{name}": float(value) for name, value in result.loss_parts.items()},
                "optimizer/lr": result.lr,
                "optimizer/grad_norm_backbone": float(result.backbone_grad_norm or 0.0),
                **{with_page(name): float(value) for name, value in result.measures.items()},
                "optimizer/skipped_backbone": num_steps - num_updates,
                **{f"optimizer/{name}": value for name, value in counts.items()},
                **({"optimizer/loss_scale": scale["cur_scale"]} if scale else {}),
                "speed/images_per_s": images_per_s,
                "speed/tflops_per_rank": tflops,
                **({"speed/mfu": tflops / peak} if peak else {}),
                "speed/data_wait_share": waited_s / seconds,
                **{f"time/{part}_s": value for part, value in times.items()},
                "memory/peak_mb": peak_memory_mb(self._device),
                "progress/epoch": done * recipe.train.global_batch / self._num_samples,
            },
        )
        self.steps.set_postfix(loss=f"{float(result.loss):.3f}")

    def add_accuracy(self, done: int, name: str, monitor: Monitor) -> None:
        """Compute an accuracy, on all ranks, and log it. Its time does not count as the steps'. Collective."""
        begin = time.perf_counter()
        accuracy = monitor.accuracy()
        if self._log:
            self._log.scalars(done, {f"evaluation/{name}": accuracy})
        self._since = replace(self._since, moment=self._since.moment + time.perf_counter() - begin)

    def close(self) -> None:
        """Flush and close."""
        self.steps.close()
        if self._log:
            self._log.close()
