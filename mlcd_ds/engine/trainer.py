"""The training loop: build, step, fit.

B images of a micro-batch on this rank, P labels an image, E embedding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.clustering.center_store import CenterStore
from mlcd_ds.config import Recipe
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.loader import LabelledBatch, TrainLoader
from mlcd_ds.data.order import SampleOrder
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.deepspeed import initialize_engine, step_engine
from mlcd_ds.distributed.engine_state import engine_state
from mlcd_ds.distributed.stopping import StopRequest
from mlcd_ds.engine.checkpoint import Checkpointer
from mlcd_ds.engine.gradients import GradientFactors, attach_gradient
from mlcd_ds.engine.init_from import find_start
from mlcd_ds.engine.knn_monitor import KnnMonitor
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.optimizer import backbone_optimizer, head_optimizer, set_learning_rate
from mlcd_ds.engine.phases import phase_at, phases
from mlcd_ds.engine.precision import head_config
from mlcd_ds.engine.profiling import StepProfiler
from mlcd_ds.engine.run_folder import run_inputs
from mlcd_ds.engine.schedule import average_decay, learning_rate
from mlcd_ds.engine.step_clock import StepClock
from mlcd_ds.engine.step_log import StepLog, StepResult
from mlcd_ds.errors import UserError
from mlcd_ds.heads.groups import make_head_groups
from mlcd_ds.heads.partial_fc import PartialFCHead
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT
from mlcd_ds.objectives.class_losses import ClassLoss

logger = logging.getLogger("mlcd_ds")  # only rank 0 logs (stages/runner.py)


class Trainer:
    """Backbone in the DeepSpeed engine, head outside it, data in front, checkpoints behind."""

    def __init__(
        self,
        recipe: Recipe,
        ds_config: dict[str, Any],
        layout: Layout,
        index: ShardIndex,
        labels: LabelStore,
        group: Group,
        device: torch.device,
    ) -> None:
        self.recipe, self.index, self.labels, self.group, self.device = recipe, index, labels, group, device
        self.layout = layout
        self.batch_slice = plan_batches(recipe, layout, group.rank)
        self.factors = GradientFactors.of(self.batch_slice.num_micro_batches, layout.data_parallel)
        if (wanted := recipe.objective.num_labels or 1) > labels.num_labels:
            raise UserError(
                f"objective.num_labels is {wanted}, but {labels.folder} holds {labels.num_labels} labels an image: "
                "lower it, or run `mlcd assign --num-labels` again."
            )
        seed = recipe.train.seed
        backbone = ViT(recipe.model)
        backbone.init_weights(torch.Generator().manual_seed(seed))
        start = find_start(recipe, labels, group)
        notes = start.fill_backbone(backbone) if start else []
        backbone.set_recompute(recipe.train.recompute)
        if recipe.train.compile:
            for block in backbone.encoder.layers:
                block.compile()
        optimizer = backbone_optimizer(backbone.to(device), recipe.optimizer, layout.zero_stage)
        self.engine = initialize_engine(backbone, optimizer, ds_config)
        self.dtype = next(self.engine.module.parameters()).dtype
        self.head = PartialFCHead(
            labels.num_centers,
            recipe.model.embed_dim,
            head_config(recipe, device),
            ClassLoss(recipe.objective),
            make_head_groups(group, recipe.head.parallel_size, layout.tensor_parallel),
            seed,
            device,
        )
        clusters = recipe.data.clusters if recipe.head.init == "centers" else None
        if start and start.checkpoint:
            notes += start.fill_head(self.head)
        else:
            self.head.init_weights(self._own_centers(clusters) if clusters else None)
        if start:
            logger.info("; ".join([f"train: starts from {start.folder}", *notes]))
        self.head_optimizer = head_optimizer(self.head, recipe.optimizer)
        self.clock = StepClock(device)
        self.state = engine_state(self.engine)
        if recipe.train.ema_decay:
            self.state.begin_average()
        self.knn = None
        if recipe.train.knn_every:
            self.knn = KnnMonitor(recipe, self.engine, self.batch_slice.micro_batch, layout, group, device)
        self.checkpointer = Checkpointer(
            recipe,
            layout,
            self.state,
            self.head,
            self.head_optimizer,
            group,
            run_inputs(index, labels),
            ds_config,
        )

    def _own_centers(self, folder: Path) -> Tensor:
        """This rank's part of the k-means centres that the labels name. UserError when the labels name others."""
        store = CenterStore(folder)
        if self.labels.manifest.inputs["clusters"] != store.manifest.fingerprint:
            raise UserError(f"data.clusters {folder} are not the clusters that {self.labels.folder} was made with.")
        classes = self.head.classes
        return torch.from_numpy(store.centers_CE[classes.begin : classes.end].copy())

    def batches(self, first: int) -> Generator[LabelledBatch, None, None]:
        """Micro-batches of the steps from `first` to the last, each phase at its resolution."""
        data, train = self.recipe.data, self.recipe.train
        order = SampleOrder(self.index.counts, data.num_streams, data.shuffle_window, train.seed)
        for phase in phases(self.recipe):
            begin, pixels = max(first, phase.begin), clip_pixels(phase.image_size)
            if begin >= phase.end:
                continue
            loader = TrainLoader(
                self.index, self.labels, order, self.batch_slice, pixels, data.augment, self.device, data.num_threads
            )
            batches = loader.batches(begin)
            try:
                for _ in range((phase.end - begin) * self.batch_slice.num_micro_batches):
                    batch = next(batches)
                    self.clock.add_wait(loader.wait_s)
                    loader.wait_s = 0.0
                    if self.batch_slice.num_shares > 1 and self.head.groups.tensor:
                        waiting = time.perf_counter()
                        batch = batch.of_all(self.head.groups.tensor)
                        self.clock.add_wait(time.perf_counter() - waiting)
                    yield batch
            finally:
                batches.close()
                loader.close()

    def step(self, step: int, batches: Iterator[LabelledBatch]) -> StepResult:
        """One optimizer step over the global batch."""
        config, clock = self.recipe.optimizer, self.clock
        clock.start()
        lr = learning_rate(step, self.recipe.train.steps, config)
        set_learning_rate(self.engine.optimizer, lr)
        token_drop = phase_at(self.recipe, step).token_drop
        self.head.resample(step)
        clock.mark("other")
        outputs = []
        for _ in range(self.batch_slice.num_micro_batches):
            batch = next(batches)
            clock.mark("data")
            noise = TrainingNoise(batch.keys_B, self.recipe.train.drop_path, token_drop)
            emb_BE = F.normalize(self.engine(batch.images_B3SS.to(self.dtype), noise).float(), dim=1)
            clock.mark("forward")
            output = self.head(emb_BE, batch.labels_BP, weight=self.factors.rows)
            clock.mark("head")
            self.engine.backward(attach_gradient(emb_BE, output, self.factors))
            clock.mark("backward")
            backbone_norm = step_engine(self.engine)
            clock.mark("optimizer")
            outputs.append(output)
        head_norm = self.head_optimizer.step(lr * config.head_lr_scale)
        if self.recipe.train.ema_decay:
            self.state.update_average(average_decay(step, self.recipe.train.ema_decay))
        clock.mark("optimizer")
        parts = {name: torch.stack([output.parts[name] for output in outputs]).mean() for name in outputs[0].parts}
        loss = torch.stack([output.loss for output in outputs]).mean()
        clock.mark("other")
        return StepResult(loss, parts, backbone_norm, head_norm, lr)

    def fit(self, stop: StopRequest) -> bool:
        """Train from the newest checkpoint to the last step. Returns False when asked to stop, after saving."""
        train = self.recipe.train
        first = self.checkpointer.resume()
        log = StepLog(
            self.recipe,
            self.index,
            self.labels,
            self.state,
            self.head_optimizer,
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
                if self.knn and (is_last or is_due(done, train.knn_every)):
                    log.add_knn(done, self.knn)
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


def is_due(done: int, every: int | None) -> bool:
    """Whether `done` steps are a multiple of `every`; never, where it is None."""
    return every is not None and done % every == 0
