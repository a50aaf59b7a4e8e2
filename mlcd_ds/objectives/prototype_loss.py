"""ProtoCLIP's loss in one direction: cross-entropy of a student's rows with the prototypes of a teacher's clusters.

    L = 1/G sum_i [log sum_k e^{z_ik} - sum_k t_ik z_ik],   z_ik = s h_i . p_k

with targets t_i by the teacher's geometry, softmax_k(c_y . c_k / tau) with y the cluster of i and c the teacher's
centres, or hard, t_ik = [k = y]. The slopes are dL/dz_ik = (softmax_k(z_i) - t_ik) / G. Rows are independent of each
other, so a rank needs none of other ranks; logits pass in blocks of rows, and nothing is recorded for autograd.

B images on this rank, b of a block, G of all ranks, K prototypes, P projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlcd_ds.kernels.matmul import Matmul

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}  # of a block of logits


@dataclass(frozen=True)
class Direction:
    """What is constant: prototypes in the student's space, and, for soft targets, the teacher's centres [K, ...]."""

    prototypes_KP: Tensor
    teacher_KP: Tensor | None
    temperature: float

    def targets(self, labels_b: Tensor) -> Tensor:
        """Soft targets [b, K] of rows in these clusters. In fp32: a temperature of .01 multiplies rounding by 100."""
        assert self.teacher_KP is not None
        logits_bK = self.teacher_KP[labels_b] @ self.teacher_KP.T
        return logits_bK.div_(self.temperature).softmax(dim=1)


def prototype_loss(
    student_BP: Tensor, labels_B: Tensor, direction: Direction, scale: Tensor, num_images: int, matmul: Matmul
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's summand of the mean over `num_images`, and its gradients by `student_BP` and by `scale`."""
    dtype = student_BP.dtype
    cast_BP, cast_KP = matmul.cast(student_BP), matmul.cast(direction.prototypes_KP.to(dtype))
    size = max(1, BLOCK_ELEMENTS[student_BP.device.type] // len(cast_KP))
    loss, grad_BP = student_BP.new_zeros(()), torch.empty_like(student_BP)
    for begin in range(0, len(student_BP), size):
        rows = slice(begin, begin + size)
        with matmul.active():  # around these products alone: soft targets are always made in fp32
            logits_bK = matmul(cast_BP[rows], cast_KP.T).mul_(scale)
        sums_b1 = logits_bK.logsumexp(dim=1, keepdim=True)
        if direction.teacher_KP is None:
            own_b1 = labels_B[rows, None]
            loss += (sums_b1 - logits_bK.gather(1, own_b1)).sum()
            slopes_bK = logits_bK.sub_(sums_b1).exp_()
            slopes_bK.scatter_add_(1, own_b1, -torch.ones_like(sums_b1))
        else:
            targets_bK = direction.targets(labels_B[rows]).to(dtype)
            loss += sums_b1.sum() - torch.dot(targets_bK.flatten(), logits_bK.flatten())
            slopes_bK = logits_bK.sub_(sums_b1).exp_().sub_(targets_bK)
        with matmul.active():
            grad_BP[rows] = matmul(matmul.cast(slopes_bK), cast_KP)
    grad_BP /= num_images
    return loss / num_images, grad_BP * scale, torch.dot(student_BP.flatten(), grad_BP.flatten())
