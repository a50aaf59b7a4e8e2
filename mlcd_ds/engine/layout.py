"""The parallel layout of a run: which ranks see which images, and which share layers and classes.

Ranks [0, tensor_parallel) are the first tensor-parallel group, and so on: they see the same images, and each holds a
part of every layer. Impossible layouts are refused here, naming the numbers, before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlcd_ds.config import Recipe
from mlcd_ds.data.loader import StreamSlice
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.registry import kind_of


@dataclass(frozen=True)
class Layout:
    """Ranks of the job, ranks of a tensor-parallel group, ZeRO stage over the data-parallel ranks."""

    num_ranks: int
    tensor_parallel: int = 1
    zero_stage: int = 0

    @property
    def data_parallel(self) -> int:
        """Groups of ranks with different images."""
        return self.num_ranks // self.tensor_parallel

    def data_rank(self, rank: int) -> int:
        """The data-parallel group of a rank."""
        return rank // self.tensor_parallel


def check_layout(recipe: Recipe, layout: Layout) -> None:
    """Raise UserError naming the numbers where layers or classes cannot be shared so."""
    size = layout.tensor_parallel
    if layout.num_ranks % size:
        raise UserError(f"tensor parallel size {size} does not divide the {layout.num_ranks} ranks.")
    kind_of(recipe.objective).check_layout(recipe, layout.num_ranks, size)
    for section, tower, config in (("model", "image", recipe.model), ("text", "text", recipe.text)):
        for key in ("heads", "mlp_width") if config and not recipe.is_frozen(tower) else ():
            if (value := getattr(config, key)) % size:
                raise UserError(
                    f"tensor parallel size {size} does not divide {section}.{key} {value}: take a size that does."
                )
    if recipe.optimizer.name == "muon" and (size > 1 or layout.zero_stage == 3):
        raise UserError(
            f"optimizer.name muon needs whole matrices: ZeRO stage {layout.zero_stage} and tensor parallel size {size} "
            "cut them. Take stage 0, 1 or 2 without tensor parallelism."
        )
    if size > 1 and recipe.train.compile:
        raise UserError("train.compile is not for tensor-parallel groups: DeepSpeed replaces the layers. Set it false.")
    if layout.zero_stage == 3 and recipe.train.compile:
        raise UserError(
            "train.compile is not for ZeRO stage 3, which gathers and frees weights while a block runs: each would be "
            "compiled anew. Set it false, or take stage 1 or 2."
        )


def plan_batches(recipe: Recipe, layout: Layout, rank: int) -> StreamSlice:
    """A rank's part of the global batch. Raises UserError naming the numbers that do not divide."""
    check_layout(recipe, layout)
    streams, ranks, batch = recipe.data.num_streams, layout.data_parallel, recipe.train.global_batch
    if streams % ranks:
        raise UserError(
            f"data.num_streams {streams} is not a multiple of the {ranks} data-parallel ranks: set "
            f"data.num_streams={ranks} (a new order of samples, so a new run), or start ranks that divide it."
        )
    per_rank = batch // ranks
    micro_batch = recipe.train.micro_batch_per_rank or per_rank
    if per_rank % micro_batch:
        divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        near = min(divisors, key=lambda n: abs(n - micro_batch))
        raise UserError(
            f"train.micro_batch_per_rank {micro_batch} does not divide the {per_rank} images a rank "
            f"(train.global_batch {batch} on {ranks} data-parallel ranks): take {near}."
        )
    place, size = layout.data_rank(rank), layout.tensor_parallel
    mine = tuple(range(place * streams // ranks, (place + 1) * streams // ranks))
    # Where a group cannot share the loading of its images evenly, each of its ranks loads them all.
    share, num_shares = (rank % size, size) if micro_batch % size == 0 else (0, 1)
    return StreamSlice(mine, batch // streams, per_rank // micro_batch, share, num_shares)
