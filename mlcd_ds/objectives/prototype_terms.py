"""The losses of ProtoCLIP's prototypes on a batch: both students, each through its projection head, towards a teacher
each, and towards an external one.

B images on this rank, P projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.objectives.base import RAW
from mlcd_ds.objectives.episode import STUDENTS, Episode
from mlcd_ds.objectives.episode_plan import ProtoClipConfig
from mlcd_ds.objectives.projection_heads import PARTS, RunningMoments, head_names, project
from mlcd_ds.objectives.prototype_loss import Direction, prototype_loss


class PrototypeTerms:
    """`weights` of the terms by name; `running`: moments of the heads' batch norms."""

    def __init__(self, config: ProtoClipConfig, group: Group, matmul: Matmul, device: torch.device) -> None:
        self._config, self._group, self._matmul = config, group, matmul
        self.weights = {"proto": config.weight} | ({"external": config.teacher_weight} if config.teacher else {})
        self.running = {tower: RunningMoments(config.head_hidden, device) for tower in STUDENTS}

    def project(self, tower: str, emb_BE: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        """Unit rows [B, P] of raw embeddings, as in evaluation."""
        return project(emb_BE, _head_of(outputs, tower), self.running[tower], None)

    def __call__(
        self, outputs: Mapping[str, Tensor], ids_B: Tensor, num_images: int, episode: Episode | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each term, a mean over the `num_images` of all ranks and not weighted yet; and the gradients of the weighted
        sum: complete ones of the raw embeddings, this rank's summands of `proto_scale` and of the heads' parameters.

        Without an episode only the heads' moments follow, and all gradients are zero: they are given nevertheless, so
        that every ZeRO stage does the same with them. Collectives: four all-reduces of [H] for each head, one of terms.
        """
        scale = outputs["proto_scale"].detach()
        sums = scale.new_zeros(len(self.weights))
        gradients = {"proto_scale": torch.zeros_like(scale)}
        for tower in STUDENTS:
            with torch.enable_grad():
                raw_BE = outputs[f"{RAW}{tower}"].detach().requires_grad_()
                head = {part: value.requires_grad_() for part, value in _head_of(outputs, tower).items()}
                student_BP = project(raw_BE, head, self.running[tower], self._group)
            slope_BP = torch.zeros_like(student_BP)
            for place, (term, weight) in enumerate(self.weights.items()) if episode else ():
                teacher = STUDENTS[tower] if term == "proto" else term
                assert episode
                direction, labels_B = self._direction(episode, tower, teacher), episode.labels_of(ids_B, teacher)
                loss, grad_BP, grad_scale = prototype_loss(
                    student_BP.detach(), labels_B, direction, scale, num_images, self._matmul
                )
                sums[place] += loss / 2
                slope_BP += grad_BP * (weight / 2)
                gradients["proto_scale"] += grad_scale * (weight / 2)
            found = torch.autograd.grad(student_BP, [raw_BE, *head.values()], slope_BP)
            gradients |= dict(zip([f"{RAW}{tower}", *head_names(tower)], found, strict=True))
        return dict(zip(self.weights, self._group.all_reduce_sum(sums), strict=True)), gradients

    def _direction(self, episode: Episode, student: str, teacher: str) -> Direction:
        is_soft = self._config.targets == "soft" and teacher in STUDENTS
        return Direction(
            episode.prototypes_of(student, teacher),
            episode.centers[teacher] if is_soft else None,
            self._config.teacher_temperature,
        )


def _head_of(outputs: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """A head's parameters by PARTS."""
    return {part: outputs[name].detach() for part, name in zip(PARTS, head_names(tower), strict=True)}
