"""Losses over class centres (class_losses.py) as an objective: the labels, the partial-FC head, and its optimizer.

B images of a micro-batch on this rank, P labels an image, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mlcd_ds.clustering.center_store import CenterStore
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.errors import UserError
from mlcd_ds.heads.choose_exp_block import check_kernel
from mlcd_ds.heads.class_sampling import num_sampled
from mlcd_ds.heads.class_shards import class_range
from mlcd_ds.heads.groups import make_head_groups, num_class_shards
from mlcd_ds.heads.head_memory import head_memory
from mlcd_ds.heads.head_state import FILE_NAME, load_head, save_head
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead
from mlcd_ds.heads.row_optimizer import AdamWRule, RowOptimizer, RowRule, SGDRule
from mlcd_ds.kernels.device import check_bf16, has_bf16
from mlcd_ds.objectives.base import Given, Need, Objective, PlannedRun
from mlcd_ds.objectives.class_losses import ClassLoss, ClassLossConfig
from mlcd_ds.objectives.label_draw import draw_labels
from mlcd_ds.recipes.sections import OptimizerConfig, Sections

USUAL_LABELS = 8  # an image, where a recipe takes all there are


class ClassCentres(Objective):
    """Discriminates clusters: a centre for each, sharded by class over the ranks, outside the engine."""

    config_type = ClassLossConfig
    sections = ("head",)
    fields = ("labels",)
    own_files = FILE_NAME

    def __init__(self, recipe: Sections, data: TrainingData, groups: ParallelGroups, device: torch.device) -> None:
        self._labels, self._clusters = data.labels, recipe.data.clusters if recipe.head.init == "centers" else None
        self._num_labels, self._num_drawn = loss_config(recipe).num_labels, loss_config(recipe).drawn_labels
        self.head = PartialFCHead(
            data.labels.num_centers,
            recipe.model.embed_dim,
            head_config(recipe, device),
            ClassLoss(loss_config(recipe)),
            make_head_groups(groups.world, recipe.head.parallel_size, groups.tensor_parallel, groups.tensor),
            recipe.train.seed,
            device,
        )
        self.optimizer = head_optimizer(self.head, recipe.optimizer)
        self._lr_scale = recipe.optimizer.head_lr_scale

    @classmethod
    def check(cls, recipe: Sections) -> None:
        if recipe.head.init == "centers" and recipe.data.labels and not recipe.data.clusters:
            raise ValueError("head.init is centers, but data.clusters is not given: add data.clusters=FOLDER")
        if recipe.head.sampling == "partial_fc" and recipe.train.micro_batch_per_rank:
            raise ValueError(
                "head.sampling partial_fc draws around the labels of a whole batch, which micro-batches cut: set "
                "train.micro_batch_per_rank=null or head.sampling=uniform"
            )

    @classmethod
    def check_layout(cls, recipe: Sections, num_ranks: int, tensor_parallel: int) -> None:
        num_class_shards(num_ranks, recipe.head.parallel_size, tensor_parallel)

    @classmethod
    def check_device(cls, recipe: Sections, device: torch.device) -> None:
        check_kernel(recipe.head.kernel, device, has_filter=loss_config(recipe).similarity_filter is not None)

    @classmethod
    def check_data(cls, recipe: Sections, data: TrainingData) -> None:
        labels = data.labels
        for key in ("num_labels", "drawn_labels"):
            if (wanted := getattr(loss_config(recipe), key) or 1) > labels.num_labels:
                raise UserError(
                    f"objective.{key} is {wanted}, but {labels.folder} holds {labels.num_labels} labels an image: "
                    "lower it, or run `mlcd assign --num-labels` again."
                )

    @classmethod
    def check_start(
        cls, recipe: Sections, note: dict[str, int], inputs: dict[str, str], data: TrainingData
    ) -> str | None:
        labels = data.labels
        if note["num_classes"] != labels.num_centers:
            difference = f"has {note['num_classes']} centres, {labels.folder} names {labels.num_centers}"
        elif not has_same_clusters(inputs, labels):
            difference = f"was trained on other clusters than those of {labels.folder}"
        else:
            return None
        return f"{difference}. Give labels of its clusters (`mlcd assign --clusters`)"

    @classmethod
    def describe(cls, recipe: Sections, data: TrainingData, num_ranks: int, tensor_parallel: int) -> list[str]:
        labels = data.labels
        shards = num_class_shards(num_ranks, recipe.head.parallel_size, tensor_parallel)
        local, loss = class_range(labels.num_centers, shards, 0), loss_config(recipe)
        lines = [
            f"labels: {labels.num_labels} an image, each one of {labels.num_centers} centres",
            f"head: {len(local)} centres on rank 0, {num_sampled(local, recipe.head.sample_rate)} sampled a step",
        ]
        if loss.drawn_labels:
            lines[0] += f"; {loss.drawn_labels} of the nearest {loss.num_labels or labels.num_labels} drawn each time"
        if loss.separate_samples:
            lines[1] += " for each label"
        return lines

    @classmethod
    def need(cls, recipe: Sections, run: PlannedRun) -> Need:
        shards, dim = recipe.head.parallel_size or run.num_ranks, recipe.model.embed_dim
        # A micro-batch's images of all ranks that share the classes.
        images, loss = run.micro_batch * shards // run.tensor_parallel, loss_config(recipe)
        num_labels = loss.drawn_labels or loss.num_labels or USUAL_LABELS
        num_samples = num_labels if loss.separate_samples else 1
        memory = head_memory(shards, run.num_classes, dim, images, num_labels, num_samples=num_samples)
        state = memory.pop("state")
        sampled = num_sampled(class_range(run.num_classes, shards, 0), recipe.head.sample_rate)
        width = 4 if recipe.train.precision == "fp32" else 2
        # Embeddings and their gradient, labels, sums and cosines: docs/head.md.
        sent = images * (dim * (width + 4) + num_labels * 8 + 2 * (num_samples + num_labels) * 4) * (1 - 1 / shards)
        return Need(
            {"head: state": state, "head: during a step": sum(memory.values())},
            sent,
            f"the head: {sampled} sampled classes a GPU" + f", {num_samples} times" * (num_samples > 1),
            8 * recipe.train.global_batch * sampled * num_samples * dim,
        )

    def init_weights(self) -> None:
        """From N(0, init_std), or from the k-means centres that the labels name. UserError when they name others."""
        self.head.init_weights(self._own_centers(self._clusters) if self._clusters else None)

    def _own_centers(self, folder: Path) -> Tensor:
        """This rank's part of the k-means centres."""
        store = CenterStore(folder)
        if self._labels.manifest.inputs["clusters"] != store.manifest.fingerprint:
            raise UserError(f"data.clusters {folder} are not the clusters that {self._labels.folder} was made with.")
        classes = self.head.classes
        return torch.from_numpy(store.centers_CE[classes.begin : classes.end].copy())

    def start_from(self, folder: Path) -> list[str]:
        load_head(folder, self.head, None)
        return [f"the head's {self.head.classes.num_classes} centres"]

    def begin_step(self, step: int) -> None:
        self.head.resample(step)

    def __call__(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], weight: float = 1.0) -> Given:
        """Of a micro-batch: its loss is a mean over images. Collectives: see `PartialFCHead.forward`."""
        labels_BP = fields["labels"]
        if self._num_drawn:
            labels_BP = draw_labels(labels_BP[:, : self._num_labels], fields["keys"], self._num_drawn)
        output = self.head(outputs["image"], labels_BP, weight=weight)
        return Given(output.loss, output.parts, {"image": output.emb_grad_BE})

    def step(self, lr: float) -> dict[str, Tensor]:
        return {"grad_norm_head": self.optimizer.step(lr * self._lr_scale)}

    def take_counts(self) -> dict[str, int]:
        return {"skipped_head": self.optimizer.take_num_skipped()}

    @property
    def is_finite(self) -> bool:
        kept = (self.head.weight_LE, *self.optimizer.state.values())
        return all(bool(tensor.isfinite().all()) for tensor in kept)

    def note(self) -> dict[str, int]:
        return {"num_classes": self.head.classes.num_classes}

    def save(self, folder: Path) -> None:
        save_head(folder, self.head, self.optimizer)

    def load(self, folder: Path) -> None:
        load_head(folder, self.head, self.optimizer)


def has_same_clusters(inputs: dict[str, str], labels: LabelStore) -> bool:
    """Whether a checkpoint's classes are those that the labels name."""
    if "clusters" in inputs:
        return inputs["clusters"] == labels.manifest.inputs["clusters"]
    return inputs["labels"] == labels.manifest.fingerprint  # an earlier version


def loss_config(recipe: Sections) -> ClassLossConfig:
    """A recipe's `objective:` section, where it is of this objective."""
    assert isinstance(recipe.objective, ClassLossConfig)
    return recipe.objective


def head_config(recipe: Sections, device: torch.device) -> HeadConfig:
    """The head's settings with its precision decided: "auto" is bf16, but fp32 where the backbone's is, or where
    `device` has no bf16. UserError when bf16 is asked for on such a device."""
    if recipe.head.precision == "bf16":
        check_bf16(device, "head.precision bf16", "set head.precision=fp32 or auto")
    if recipe.head.precision != "auto":
        return recipe.head
    is_fp32 = recipe.train.precision == "fp32" or not has_bf16(device)
    return recipe.head.model_copy(update={"precision": "fp32" if is_fp32 else "bf16"})


def head_optimizer(head: PartialFCHead, config: OptimizerConfig) -> RowOptimizer:
    """The centres' optimizer, as the head's settings say."""
    rule: RowRule
    if head.config.optimizer == "adamw":
        rule = AdamWRule(config.betas, config.eps, config.weight_decay)
    else:
        rule = SGDRule(head.config.momentum, config.weight_decay)
    return RowOptimizer(head, rule, config.head_clip_norm, is_lazy=head.config.update == "lazy")
