"""Which ranks share the classes, which share images, and which repeat each other.

    classes   ranks that hold all classes between them
    data      ranks of `classes` with different images: embeddings are gathered over these
    tensor    ranks of `classes` with the same images: a tensor-parallel backbone's; None where it has one rank
    replicas  ranks of different `classes` groups that hold the same classes; None where there is one group

By default all ranks share the classes. With smaller head groups embeddings travel less far (inside a node, say), and
the centres' gradients are summed over the groups instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlcd_ds.distributed.collectives import Group, subgroup
from mlcd_ds.errors import UserError


@dataclass(frozen=True)
class HeadGroups:
    """This rank's groups, see above."""

    classes: Group
    data: Group
    tensor: Group | None = None
    replicas: Group | None = None

    @property
    def num_replicas(self) -> int:
        return self.replicas.size if self.replicas else 1


def num_class_shards(size: int, head_parallel: int | None, tensor_parallel: int) -> int:
    """Over how many of `size` ranks the classes are spread. Raises UserError where the sizes do not divide."""
    if size % tensor_parallel:
        raise UserError(f"tensor parallel size {tensor_parallel} does not divide the {size} ranks.")
    shards = head_parallel or size
    if size % shards or shards % tensor_parallel:
        choices = [n for n in range(tensor_parallel, size + 1, tensor_parallel) if size % n == 0]
        raise UserError(
            f"head.parallel_size {shards} must divide the {size} ranks and be a multiple of the tensor parallel size "
            f"{tensor_parallel}: take one of {choices}, or leave it out for {size}."
        )
    return shards


def make_head_groups(
    world: Group, head_parallel: int | None = None, tensor_parallel: int = 1, tensor_group: Group | None = None
) -> HeadGroups:
    """Split the ranks; consecutive ones belong together. Raises UserError where the sizes do not divide.

    `tensor_group`: this rank's, where it was made already. Collective: every rank makes every group.
    """
    size, tensor = world.size, tensor_parallel
    shards = num_class_shards(size, head_parallel, tensor)
    blocks = [range(first, first + shards) for first in range(0, size, shards)]
    data = [block[place::tensor] for block in blocks for place in range(tensor)]
    peers = [range(first, first + tensor) for first in range(0, size, tensor)]
    if tensor > 1 and tensor_group is None:
        tensor_group = subgroup(world, peers)
    twins = [range(place, size, shards) for place in range(shards)]
    return HeadGroups(
        classes=subgroup(world, blocks),
        data=subgroup(world, data),
        tensor=tensor_group,
        replicas=subgroup(world, twins) if shards < size else None,
    )
