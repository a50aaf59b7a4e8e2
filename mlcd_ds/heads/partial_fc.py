"""The partial-FC head: a centre for each class, sharded by class over all ranks, outside the DeepSpeed engine.

B images on this rank, G of all ranks, E embedding, L classes on this rank, S of them sampled, P labels an image,
K pairs (image, label) whose label lives on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.heads.class_shards import class_range
from mlcd_ds.heads.initial import normal_centers, projected_centers
from mlcd_ds.heads.sampling import sample_classes
from mlcd_ds.manifest import Frozen
from mlcd_ds.objectives.mlcd import MLCDLoss


class HeadConfig(Frozen):
    """The head's own settings."""

    sample_rate: float = Field(0.1, gt=0, le=1, description="r: part of the classes drawn as negatives each step (0.1)")
    init: Literal["normal", "centers"] = Field(
        "normal", description="first centres: random, or the k-means centres in data.clusters, projected"
    )
    init_std: float = Field(0.01, gt=0, description="deviation of the first centres' entries")


@dataclass(frozen=True)
class HeadOutput:
    """Means over the global batch (no gradient), and the gradient of the loss for this rank's embeddings [B, E]."""

    loss: Tensor
    negative_term: Tensor
    positive_term: Tensor
    emb_grad_BE: Tensor


class PartialFCHead(nn.Module):
    """Class centres of this rank, and the loss over the classes of all ranks.

    The loss is the mean over the global batch; the centres' gradient is that of this mean and needs no averaging.
    """

    def __init__(
        self, num_classes: int, dim: int, config: HeadConfig, objective: MLCDLoss, group: Group, seed: int
    ) -> None:
        super().__init__()
        self.config, self.objective, self.group, self.seed = config, objective, group, seed
        self.classes = class_range(num_classes, group.size, group.rank)
        self.weight_LE = nn.Parameter(torch.full((len(self.classes), dim), float("nan")))
        self.sampled_S = torch.empty(0, dtype=torch.int64)

    def init_weights(self, centers_LE: Tensor | None = None) -> None:
        """Set the centres: from N(0, init_std), or from this rank's k-means centres where they are given."""
        dim = self.weight_LE.shape[1]
        if centers_LE is None:
            rows_LE = normal_centers(self.classes, dim, self.config.init_std, self.seed)
        else:
            rows_LE = projected_centers(centers_LE, self.classes.num_classes, dim, self.config.init_std, self.group)
        with torch.no_grad():
            self.weight_LE.copy_(rows_LE)

    def resample(self, step: int) -> None:
        """Draw the negatives of an optimizer step; all its micro-batches share them."""
        sampled_S = sample_classes(self.classes, self.config.sample_rate, self.seed, step)
        self.sampled_S = sampled_S.to(self.weight_LE.device)

    def forward(self, emb_BE: Tensor, labels_BP: Tensor, weight: float = 1.0) -> HeadOutput:
        """Loss and gradients of a micro-batch; adds `weight` times the centres' gradient to `weight_LE.grad`.

        `emb_BE` unit length, fp32; `labels_BP` int64 global classes, -1 for none. B is the same on every rank.
        Collectives: all-gather of embeddings and labels, all-reduce of [2, G] sums, reduce-scatter of [G, E] gradients.
        """
        emb_GE = self.group.all_gather(emb_BE.detach()).requires_grad_()
        labels_GP = without_repeats(self.group.all_gather(labels_BP))
        images_K, rows_K = self._pairs(labels_GP)
        with torch.enable_grad():
            centers_SE = self.weight_LE.detach()[self.sampled_S].requires_grad_()
            centers_KE = self.weight_LE.detach()[rows_K].requires_grad_()
            cosines_GS = emb_GE @ F.normalize(centers_SE, dim=1).T
            cosines_GS = cosines_GS.masked_fill(self._own(images_K, rows_K, cosines_GS.shape), -torch.inf)
            cosines_K = (emb_GE[images_K] * F.normalize(centers_KE, dim=1)).sum(dim=1)
            negative_G = self.objective.negative_sums(cosines_GS)
            positive_G = self.objective.positive_sums(cosines_K, images_K, len(emb_GE))
        totals_2G = self.group.all_reduce_sum(torch.stack([negative_G.detach(), positive_G.detach()]))
        terms_2G = torch.stack(self.objective.terms(*totals_2G))
        slopes_2G = torch.stack(self.objective.slopes(*totals_2G)) / len(emb_GE)
        emb_grad_GE, grad_SE, grad_KE = torch.autograd.grad(
            [negative_G, positive_G], [emb_GE, centers_SE, centers_KE], list(slopes_2G)
        )
        self._accumulate(grad_SE, rows_K, grad_KE, weight)
        means_2 = terms_2G.mean(dim=1)
        return HeadOutput(means_2.sum(), means_2[0], means_2[1], self.group.reduce_scatter_sum(emb_grad_GE))

    def _pairs(self, labels_GP: Tensor) -> tuple[Tensor, Tensor]:
        """Images and local class rows [K] of the labels that live here."""
        local_GP = labels_GP - self.classes.begin
        images_K, places_K = ((labels_GP >= 0) & (local_GP >= 0) & (local_GP < len(self.classes))).nonzero(
            as_tuple=True
        )
        return images_K, local_GP[images_K, places_K]

    def _own(self, images_K: Tensor, rows_K: Tensor, shape: torch.Size) -> Tensor:
        """Mask [G, S] of the sampled classes that are positives of the image."""
        slots_L = torch.full((len(self.classes),), -1, device=rows_K.device)
        slots_L[self.sampled_S] = torch.arange(len(self.sampled_S), device=rows_K.device)
        slots_K = slots_L[rows_K]
        # Classes that were not sampled go to a column of their own, which is cut off: selecting them would synchronise.
        mask = torch.zeros(shape[0], shape[1] + 1, dtype=torch.bool, device=rows_K.device)
        mask[images_K, slots_K] = True
        return mask[:, :-1]

    def _accumulate(self, grad_SE: Tensor, rows_K: Tensor, grad_KE: Tensor, weight: float) -> None:
        if self.weight_LE.grad is None:
            self.weight_LE.grad = torch.zeros_like(self.weight_LE)
        self.weight_LE.grad.index_add_(0, self.sampled_S, grad_SE, alpha=weight)
        self.weight_LE.grad.index_add_(0, rows_K, grad_KE, alpha=weight)


def without_repeats(labels_GP: Tensor) -> Tensor:
    """Labels of an image are a set: a second mention becomes -1."""
    same_GPP = labels_GP[:, :, None] == labels_GP[:, None, :]
    return labels_GP.masked_fill(same_GPP.tril(diagonal=-1).any(dim=2), -1)


class _GivenGradient(torch.autograd.Function):
    """Forward: a loss computed elsewhere. Backward: its gradient, computed elsewhere too."""

    @staticmethod
    def forward(ctx: Any, emb_BE: Tensor, loss: Tensor, emb_grad_BE: Tensor) -> Tensor:
        ctx.save_for_backward(emb_grad_BE)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (emb_grad_BE,) = ctx.saved_tensors
        return upstream * emb_grad_BE, None, None


def attach_gradient(emb_BE: Tensor, output: HeadOutput, num_averaged_ranks: int) -> Tensor:
    """A scalar loss whose backward hands the embeddings their gradient.

    The engine averages gradients over `num_averaged_ranks` data-parallel ranks, while the loss is a mean over the
    global batch, whose gradient is the sum of the ranks': hence the factor.
    """
    return _GivenGradient.apply(emb_BE, output.loss, output.emb_grad_BE * num_averaged_ranks)
