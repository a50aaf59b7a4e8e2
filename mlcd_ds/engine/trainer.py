"""The training loop: build, step, fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.config import Recipe
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.loader import Batch, TrainLoader
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.deepspeed import initialize_engine, step_engine
from mlcd_ds.distributed.engine_state import engine_state
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.distributed.stopping import StopRequest
from mlcd_ds.engine.build_towers import build_towers
from mlcd_ds.engine.checkpoint import Checkpointer
from mlcd_ds.engine.gradients import GradientFactors, attach_gradient
from mlcd_ds.engine.init_from import find_start
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.monitors import build_monitors
from mlcd_ds.engine.optimizer import backbone_optimizer, set_learning_rate
from mlcd_ds.engine.phases import phase_at, phases
from mlcd_ds.engine.profiling import StepProfiler
from mlcd_ds.engine.schedule import average_decay, learning_rate
from mlcd_ds.engine.step_clock import StepClock
from mlcd_ds.engine.step_log import StepLog, StepResult
from mlcd_ds.errors import UserError
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.objectives.base import RAW, Given, has_rows, join_fields, join_outputs
from mlcd_ds.objectives.registry import kind_of

Norm = Tensor | float | None  # of the engine's gradient, before clipping
logger = logging.getLogger("mlcd_ds")  # only rank 0 logs (stages/runner.py)


class Trainer:
    """Towers in the DeepSpeed engine, the objective outside it, data in front, checkpoints behind."""

    def __init__(
        self,
        recipe: Recipe,
        ds_config: dict[str, Any],
        layout: Layout,
        data: TrainingData,
        group: Group,
        device: torch.device,
    ) -> None:
        self.recipe, self.data, self.group, self.device = recipe, data, group, device
        self.layout, self.groups = layout, ParallelGroups(group, layout.tensor_parallel)
        self.batch_slice = plan_batches(recipe, layout, group.rank)
        self.factors = GradientFactors.of(self.batch_slice.num_micro_batches, layout.data_parallel)
        size = self.batch_slice.micro_batch
        self.monitors = build_monitors(recipe, data, self.embed, size, layout, group, device)
        kind = kind_of(recipe.objective)
        self.is_whole = kind.sees_whole_batch(recipe) and self.batch_slice.num_micro_batches > 1
        start = find_start(recipe, data, group)
        built = build_towers(recipe, start, group)
        towers, notes = built.trained, built.notes
        self.frozen = {name: tower.to(device) for name, tower in built.frozen.items()}
        towers.set_recompute(recipe.train.recompute)
        if recipe.train.compile:
            towers.compile_blocks()
        optimizer = backbone_optimizer(towers.to(device), recipe.optimizer, layout.zero_stage)
        self.engine = initialize_engine(towers, optimizer, ds_config)
        self.dtype = next(self.engine.module.parameters()).dtype
        self.tower_names = towers.names
        self.norms: dict[str, Tensor] = {}  # of embeddings, before they are normalised: means of a micro-batch's
        self.objective = kind(recipe, data, self.groups, device)
        if start:
            notes += start.fill_objective(self.objective, recipe)
            logger.info("; ".join([f"train: starts from {start.folder}", *notes]))
        else:
            self.objective.init_weights()
        self.clock = StepClock(device)
        self.state = engine_state(self.engine)
        if recipe.train.ema_decay:
            self.state.begin_average()
        self.checkpointer = Checkpointer(
            recipe, layout, self.state, self.objective, self.groups, data.inputs, ds_config, built.records
        )

    def batches(self, first: int) -> Generator[Batch, None, None]:
        """Micro-batches of the steps from `first` to the last, each phase at its resolution."""
        data = self.recipe.data
        order = kind_of(self.recipe.objective).sample_order(self.recipe, self.data.counts)
        for phase in phases(self.recipe):
            begin, pixels = max(first, phase.begin), clip_pixels(phase.image_size)
            if begin >= phase.end:
                continue
            loader = TrainLoader(
                self.data, order, self.batch_slice, pixels, data.augment, self.device, data.num_threads
            )
            batches = loader.batches(begin)
            try:
                for _ in range((phase.end - begin) * self.batch_slice.num_micro_batches):
                    batch = next(batches)
                    self.clock.add_wait(loader.wait_s)
                    loader.wait_s = 0.0
                    if self.batch_slice.num_shares > 1 and self.groups.tensor:
                        waiting = time.perf_counter()
                        batch = batch.of_all(self.groups.tensor)
                        self.clock.add_wait(time.perf_counter() - waiting)
                    yield batch
            finally:
                batches.close()
                loader.close()

    def step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """One optimizer step over the global batch."""
        config, clock = self.recipe.optimizer, self.clock
        clock.start()
        lr = learning_rate(step, self.recipe.train.steps, config)
        set_learning_rate(self.engine.optimizer, lr, self.objective.still_towers(step))
        token_drop = phase_at(self.recipe, step).token_drop
        if self.objective.begin_phase(step, self.embed, self.own_outputs):
            clock.mark("phase")
        self.objective.begin_step(step)
        clock.mark("other")
        learn = self._learn_whole if self.is_whole else self._learn_by_micro_batch
        all_given, backbone_norm = learn(batches, token_drop)
        measures = self.objective.step(lr)
        if self.recipe.train.ema_decay:
            self.state.update_average(average_decay(step, self.recipe.train.ema_decay))
        clock.mark("optimizer")
        parts = {name: torch.stack([given.parts[name] for given in all_given]).mean() for name in all_given[0].parts}
        loss = torch.stack([given.loss for given in all_given]).mean()
        clock.mark("other")
        return StepResult(loss, parts, backbone_norm, measures | self.norms, lr)

    def _learn_by_micro_batch(self, batches: Iterator[Batch], token_drop: float) -> tuple[list[Given], Norm]:
        """The objective is called for each micro-batch: the loss is the mean of theirs."""
        all_given, norm, clock = [], None, self.clock
        for _ in range(self.batch_slice.num_micro_batches):
            batch = next(batches)
            clock.mark("data")
            outputs = self._forward(*self._inputs(batch, token_drop))
            frozen = self._frozen_outputs(batch)
            clock.mark("forward")
            given = self.objective(outputs | frozen, batch.numbered_fields, self.factors.own)
            clock.mark("head")
            norm = self._backward(outputs, given, self.factors)
            all_given.append(given)
        return all_given, norm

    def _learn_whole(self, batches: Iterator[Batch], token_drop: float) -> tuple[list[Given], Norm]:
        """The objective is called once, for all micro-batches: each is embedded without gradient before, and again
        with the gradient that it was given. The noise belongs to the images, so it is the same in both passes."""
        clock, factors = self.clock, self.factors.of_whole(self.batch_slice.num_micro_batches)
        held, embedded, fields = [], [], []
        for number in range(self.batch_slice.num_micro_batches):
            batch = next(batches)
            clock.mark("data")
            held.append(self._inputs(batch, token_drop))
            with torch.no_grad():
                outputs = self._forward(*held[-1]) | self._frozen_outputs(batch)
            # What has no rows is the same in each: one copy of an objective's weights is enough.
            embedded.append({name: output for name, output in outputs.items() if not number or has_rows(name)})
            fields.append(batch.numbered_fields)
            clock.mark("forward")
        given = self.objective(join_outputs(embedded), join_fields(fields), factors.own)
        clock.mark("head")
        for inputs, share in zip(held, given.shares(len(held)), strict=True):
            outputs = self._forward(*inputs)
            clock.mark("forward")
            norm = self._backward(outputs, share, factors)
        return [given], norm

    def _backward(self, outputs: dict[str, Tensor], given: Given, factors: GradientFactors) -> Norm:
        self.engine.backward(attach_gradient(outputs, given, factors))
        self.clock.mark("backward")
        norm = step_engine(self.engine)
        self.clock.mark("optimizer")
        return norm

    def _inputs(self, batch: Batch, token_drop: float) -> tuple[dict[str, Tensor], TrainingNoise]:
        """What the towers in the engine are given."""
        noise = TrainingNoise(batch.keys_B, self.recipe.train.drop_path, token_drop)
        return {name: _input(name, batch, self.dtype) for name in self.tower_names}, noise

    def _forward(self, inputs: dict[str, Tensor], noise: TrainingNoise) -> dict[str, Tensor]:
        """The towers' embeddings, raw and at unit length, fp32 [B, E], and what the objective's module adds."""
        outputs = self.engine(noise, **inputs)
        embedded = {name: outputs[name].float() for name in self.tower_names}
        self.norms = {
            f"embeddings/norm_{name}": emb_BE.detach().norm(dim=1).mean() for name, emb_BE in embedded.items()
        }
        raw = {f"{RAW}{name}": emb_BE for name, emb_BE in embedded.items()}
        return outputs | raw | {name: F.normalize(emb_BE, dim=1) for name, emb_BE in embedded.items()}

    @torch.no_grad()
    def embed(self, tower: str, given: Tensor, *, is_projected: bool) -> Tensor:
        """What a tower gives for images or tokens without noise, as it is now: embeddings or features, fp32. Calls the
        engine's collectives, where the tower is trained."""
        if tower in self.frozen:
            dtype = next(self.frozen[tower].parameters()).dtype
            return self.frozen[tower](given.to(dtype) if tower == "image" else given, is_projected=is_projected).float()
        self.engine.eval()
        output = self.engine(**{tower: given.to(self.dtype) if tower == "image" else given}, is_projected=is_projected)
        self.engine.train()
        return output[tower].float()

    @torch.no_grad()
    def own_outputs(self) -> dict[str, Tensor]:
        """What the objective's module gives as it is now. Calls the engine's collectives."""
        return self.engine()

    @torch.inference_mode()
    def _frozen_outputs(self, batch: Batch) -> dict[str, Tensor]:
        """The frozen towers' embeddings at unit length, fp32 [B, E], of images without noise."""
        outputs = {}
        for name, tower in self.frozen.items():
            dtype = next(tower.parameters()).dtype
            outputs[name] = F.normalize(tower(_input(name, batch, dtype)).float(), dim=1)
        return outputs

    def fit(self, stop: StopRequest) -> bool:
        """Train from the newest checkpoint to the last step. Returns False when asked to stop, after saving."""
        train = self.recipe.train
        first = self.checkpointer.resume()
        log = StepLog(
            self.recipe,
            self.data,
            self.state,
            self.objective,
            self.clock,
            self.group,
            self.device,
            first,
        )
        profiler = StepProfiler(train.out, train.profile_steps if self.group.is_main else None)
        batches = self.batches(first)
        try:
            for step in log.steps:
                profiler.before(step)
                result = self.step(step, batches)
                profiler.after(step)
                done = step + 1
                is_last = done == train.steps
                is_logged = is_last or is_due(done, train.log_every)
                if is_logged:
                    log.add(done, result)
                is_stopped = stop.was_asked(self.group) and not is_last
                is_saved = is_stopped or is_last or is_due(done, train.checkpoint_every)
                is_saved = is_saved or is_due(done, train.milestone_every)
                if is_saved or is_logged:
                    self._check_loss(done, float(result.loss))
                for name, (every, monitor) in self.monitors.items():
                    if is_last or is_due(done, every):
                        log.add_accuracy(done, name, monitor)
                if is_saved:
                    self.checkpointer.save(done)
                if is_stopped:
                    return False
            return True
        finally:
            batches.close()
            log.close()
            profiler.close()

    @staticmethod
    def _check_loss(done: int, loss: float) -> None:
        """A run that has diverged must end, and must not save: all ranks see the same loss."""
        if not loss < float("inf"):
            raise UserError(
                f"the loss is {loss} at step {done}: lower optimizer.lr; TensorBoard's optimizer page shows the norms. "
                "Started again, the run goes on from its last checkpoint."
            )


def _input(tower: str, batch: Batch, dtype: torch.dtype) -> Tensor:
    """What a tower is given."""
    return batch.images_B3SS.to(dtype) if tower == "image" else batch.fields["tokens"]


def is_due(done: int, every: int | None) -> bool:
    """Whether `done` steps are a multiple of `every`; never, where it is None."""
    return every is not None and done % every == 0
