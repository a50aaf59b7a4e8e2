"""What benchmarks/head.py compares the head with: the plain dense form, and Partial FC with a softmax for each label.

Both are written for this comparison from their descriptions, and both hold what autograd holds. B images of a rank,
G of all ranks, E embedding, L classes of a rank, S of them sampled, P labels an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.heads.class_sampling import num_sampled, sample_classes
from mlcd_ds.heads.class_shards import class_range

SCALE, MARGIN = 64.0, 0.3


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx, emb_BE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(emb_BE)

    @staticmethod
    def backward(ctx, grad_GE: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter_sum(grad_GE), None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce; every rank goes on with the same value, and its backward is the identity."""

    @staticmethod
    def forward(ctx, values: Tensor, group: Group) -> Tensor:
        return group.all_reduce_sum(values.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Reference(nn.Module):
    """Centres of this rank under torch's dense AdamW, clipped by the norm over all shards."""

    def __init__(self, num_classes: int, dim: int, rate: float, group: Group, device: torch.device) -> None:
        super().__init__()
        self.classes, self.rate, self.group = class_range(num_classes, group.size, group.rank), rate, group
        self.weight_LE = nn.Parameter(torch.randn(len(self.classes), dim, device=device) * 0.01)
        self.optimizer = torch.optim.AdamW([self.weight_LE], lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
        self.step_number = 0

    def step(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        """Forward, backward and optimizer; returns the gradient of the embeddings."""
        emb_BE = emb_BE.detach().requires_grad_()
        self.loss(emb_BE, labels_BP).backward()
        norm = self.group.all_reduce_sum(self.weight_LE.grad.square().sum()).sqrt()
        self.weight_LE.grad.mul_((5.0 / (norm + 1e-6)).clamp_max(1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return emb_BE.grad

    def loss(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        raise NotImplementedError


class DenseMLCD(Reference):
    """The MLCD loss over the same sample as the head's, with all logits in memory."""

    def loss(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        emb_GE = _GatherWithGradient.apply(emb_BE, self.group)
        local_GP = self.group.all_gather(labels_BP) - self.classes.begin
        sampled_S = sample_classes(self.classes, self.rate, 0, self.step_number, emb_BE.device)
        images_K, places_K = ((local_GP >= 0) & (local_GP < len(self.classes))).nonzero(as_tuple=True)
        rows_K = local_GP[images_K, places_K]
        slots_L = torch.full((len(self.classes),), len(sampled_S), device=emb_BE.device)
        slots_L[sampled_S] = torch.arange(len(sampled_S), device=emb_BE.device)
        own_GS = torch.zeros(len(emb_GE), len(sampled_S) + 1, dtype=torch.bool, device=emb_BE.device)
        own_GS[images_K, slots_L[rows_K]] = True
        logits_GS = SCALE * emb_GE @ F.normalize(self.weight_LE[sampled_S], dim=1).T
        negative_G = torch.exp(logits_GS.masked_fill(own_GS[:, :-1], -torch.inf) - SCALE / 2).sum(dim=1)
        cosines_K = (emb_GE[images_K] * F.normalize(self.weight_LE[rows_K], dim=1)).sum(dim=1)
        exp_K = torch.exp(SCALE * (MARGIN - cosines_K) - SCALE * (1 + MARGIN) / 2)
        positive_G = torch.zeros(len(emb_GE), device=emb_BE.device).index_add(0, images_K, exp_K)
        sums_2G = _SumOverRanks.apply(torch.stack([negative_G, positive_G]), self.group)
        shifts_2 = torch.tensor([SCALE / 2, SCALE * (1 + MARGIN) / 2], device=emb_BE.device)
        return (torch.log(sums_2G + torch.exp(-shifts_2)[:, None]) + shifts_2[:, None]).sum(dim=0).mean()


class PartialFCPerLabel(Reference):
    """Partial FC (arXiv 2203.15565), as its authors' multi-label successor uses it.

    For each of P labels a sample of its own that holds the batch's labels, a softmax over it; the mean of the P losses.
    """

    def loss(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        emb_GE = F.normalize(_GatherWithGradient.apply(emb_BE, self.group), dim=1)
        local_GP = self.group.all_gather(labels_BP) - self.classes.begin
        losses = [self._softmax(emb_GE, local_G) for local_G in local_GP.unbind(dim=1)]
        return torch.stack(losses).mean()

    def _softmax(self, emb_GE: Tensor, local_G: Tensor) -> Tensor:
        is_here_G = (local_G >= 0) & (local_G < len(self.classes))
        positives = local_G[is_here_G].unique()
        order_L = torch.rand(len(self.classes), device=emb_GE.device)
        order_L[positives] = 2.0
        size = max(num_sampled(self.classes, self.rate), len(positives))
        sampled_S = order_L.topk(size).indices.sort().values
        places_G = torch.searchsorted(sampled_S, local_G.where(is_here_G, 0))
        logits_GS = (emb_GE @ F.normalize(self.weight_LE[sampled_S], dim=1).T).clamp(-1, 1)
        one_hot = (torch.arange(len(local_G), device=emb_GE.device)[is_here_G], places_G[is_here_G])
        logits_GS = logits_GS.index_put(one_hot, logits_GS[one_hot] - MARGIN) * SCALE
        largest_G = self.group.all_reduce_max(logits_GS.detach().amax(dim=1))
        exp_GS = torch.exp(logits_GS - largest_G[:, None])
        total_G = _SumOverRanks.apply(exp_GS.sum(dim=1), self.group)
        probability_GS = exp_GS / total_G[:, None]
        target_G = torch.zeros(len(local_G), device=emb_GE.device).index_put((one_hot[0],), probability_GS[one_hot])
        return -_SumOverRanks.apply(target_G, self.group).clamp_min(1e-30).log().mean()
