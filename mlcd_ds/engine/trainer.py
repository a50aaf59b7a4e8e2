"""The training loop: build, step, fit.

B images of a micro-batch on this rank, P labels an image, E embedding.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mlcd_ds.clustering.center_store import CenterStore
from mlcd_ds.config import Recipe, dump_recipe
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.loader import LabelledBatch, TrainLoader
from mlcd_ds.data.order import SampleOrder
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.deepspeed import initialize_engine, step_engine
from mlcd_ds.distributed.stopping import StopRequest
from mlcd_ds.engine.checkpoint import Checkpointer
from mlcd_ds.engine.hardware import peak_tflops
from mlcd_ds.engine.init_from import find_start
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.optimizer import backbone_optimizer, head_optimizer, set_learning_rate
from mlcd_ds.engine.phases import phase_at, phases
from mlcd_ds.engine.precision import head_config
from mlcd_ds.engine.run_folder import run_inputs
from mlcd_ds.engine.run_log import RunLog, log_data_pages, peak_memory_mb
from mlcd_ds.engine.schedule import learning_rate
from mlcd_ds.errors import UserError
from mlcd_ds.heads.groups import make_head_groups
from mlcd_ds.heads.partial_fc import PartialFCHead, attach_gradient
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT, flops_per_image
from mlcd_ds.objectives.class_losses import ClassLoss

logger = logging.getLogger("mlcd_ds")  # only rank 0 logs (stages/runner.py)


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: means over the global batch, gradient norms before clipping. Tensors, no host sync."""

    loss: Tensor
    loss_parts: dict[str, Tensor]
    backbone_grad_norm: Tensor | float | None
    head_grad_norm: Tensor
    lr: float


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
        self.engine = initialize_engine(backbone.to(device), backbone_optimizer(backbone, recipe.optimizer), ds_config)
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
        if start and start.checkpoint:
            notes += start.fill_head(self.head)
        else:
            self.head.init_weights(None if recipe.head.init == "normal" else self._own_centers(recipe.data.clusters))
        if start:
            logger.info("; ".join([f"train: starts from {start.folder}", *notes]))
        self.head_optimizer = head_optimizer(self.head, recipe.optimizer)
        self.wait_s = 0.0  # for data, since the last entry of the log
        self.checkpointer = Checkpointer(
            recipe,
            layout,
            self.engine,
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

    def batches(self, first: int) -> Iterator[LabelledBatch]:
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
                    self.wait_s, loader.wait_s = self.wait_s + loader.wait_s, 0.0
                    if self.batch_slice.num_shares > 1:
                        waiting = time.perf_counter()
                        batch = batch.of_all(self.head.groups.tensor)
                        self.wait_s += time.perf_counter() - waiting
                    yield batch
            finally:
                batches.close()
                loader.close()

    def step(self, step: int, batches: Iterator[LabelledBatch]) -> StepResult:
        """One optimizer step over the global batch."""
        config = self.recipe.optimizer
        lr = learning_rate(step, self.recipe.train.steps, config)
        set_learning_rate(self.engine.optimizer, lr)
        token_drop = phase_at(self.recipe, step).token_drop
        self.head.resample(step)
        num_micro_batches = self.batch_slice.num_micro_batches
        outputs = []
        for _ in range(num_micro_batches):
            batch = next(batches)
            noise = TrainingNoise(batch.keys_B, self.recipe.train.drop_path, token_drop)
            emb_BE = F.normalize(self.engine(batch.images_B3SS.to(self.dtype), noise).float(), dim=1)
            output = self.head(emb_BE, batch.labels_BP, weight=1 / num_micro_batches)
            self.engine.backward(attach_gradient(emb_BE, output, self.layout.data_parallel))
            backbone_norm = step_engine(self.engine)
            outputs.append(output)
        head_norm = self.head_optimizer.step(lr * config.head_lr_scale)
        parts = {name: torch.stack([output.parts[name] for output in outputs]).mean() for name in outputs[0].parts}
        loss = torch.stack([output.loss for output in outputs]).mean()
        return StepResult(loss, parts, backbone_norm, head_norm, lr)

    def fit(self, stop: StopRequest) -> bool:
        """Train from the newest checkpoint to the last step. Returns False when asked to stop, after saving."""
        train = self.recipe.train
        first = self.checkpointer.resume()
        log = self._open_log(first)
        batches = self.batches(first)
        quiet = not (self.group.is_main and sys.stderr.isatty())
        bar = tqdm(
            range(first, train.steps), initial=first, total=train.steps, unit="step", desc="train", disable=quiet
        )
        began, logged = time.perf_counter(), first
        try:
            for step in bar:
                result = self.step(step, batches)
                done = step + 1
                if done % train.log_every == 0 or done == train.steps:
                    seconds, began = time.perf_counter() - began, time.perf_counter()
                    self._log(log, bar, done, result, seconds, done - logged)
                    logged = done
                is_stopped = stop.was_asked(self.group) and done < train.steps
                is_saved = is_stopped or done % train.checkpoint_every == 0 or done == train.steps
                if is_saved or done % train.log_every == 0:
                    self._check_loss(done, float(result.loss))
                if is_saved:
                    self.checkpointer.save(done)
                if is_stopped:
                    return False
            return True
        finally:
            bar.close()
            batches.close()
            if log:
                log.close()

    @staticmethod
    def _check_loss(done: int, loss: float) -> None:
        """A run that has diverged must end, and must not save: all ranks see the same loss."""
        if not loss < float("inf"):
            raise UserError(
                f"the loss is {loss} at step {done}: lower optimizer.lr; TensorBoard's optimizer page shows the norms. "
                "Started again, the run goes on from its last checkpoint."
            )

    def _open_log(self, first: int) -> RunLog | None:
        if not self.group.is_main:
            return None
        log = RunLog(Path(self.recipe.train.out), first)
        if first == 0:
            log_data_pages(log, self.index, self.labels, dump_recipe(self.recipe))
        return log

    def _log(
        self, log: RunLog | None, bar: tqdm, done: int, result: StepResult, seconds: float, num_steps: int
    ) -> None:
        waited, self.wait_s = self.wait_s, 0.0
        if log is None:
            return
        loss, phase = float(result.loss), phase_at(self.recipe, done - 1)
        images_per_s = num_steps * self.recipe.train.global_batch / seconds
        flops = 3 * flops_per_image(self.recipe.model, phase.image_size, phase.token_drop)
        tflops = images_per_s * flops / self.group.size / 1e12
        peak = peak_tflops(self.device)
        log.scalars(
            done,
            {
                "loss/total": loss,
                **{f"loss/{name}": float(value) for name, value in result.loss_parts.items()},
                "optimizer/lr": result.lr,
                "optimizer/grad_norm_backbone": float(result.backbone_grad_norm or 0.0),
                "optimizer/grad_norm_head": float(result.head_grad_norm),
                "speed/images_per_s": images_per_s,
                "speed/tflops_per_rank": tflops,
                **({"speed/mfu": tflops / peak} if peak else {}),
                "speed/data_wait_share": waited / seconds,
                "memory/peak_mb": peak_memory_mb(self.device),
                "progress/epoch": done * self.recipe.train.global_batch / self.index.num_images,
            },
        )
        bar.set_postfix(loss=f"{loss:.3f}")
