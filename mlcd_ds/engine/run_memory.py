"""How much memory the towers of a training take on a rank: what ZeRO keeps and shards, and activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlcd_ds.distributed.ds_config import ZeroBuffers
from mlcd_ds.engine.activations import DTYPES, Activations
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.planned_towers import PlannedTower
from mlcd_ds.engine.precision import is_autocast
from mlcd_ds.models.layers import Recompute

DECODED_PIXELS = 1_000_000  # of an image as it is stored: assumed
BATCHES_IN_FLIGHT = 2  # one that is decoded beside the one that is trained on


def decoding_memory(batch: int, image_size: int, decoded_pixels: int = DECODED_PIXELS) -> int:
    """Bytes that DALI takes on a GPU to decode batches of so many images, where torch's allocator does not see them.

    Of an image: decoded and cropped in bytes, twice at the final size in bytes (resized, colours changed), and in fp32.
    """
    pixels = image_size**2
    return BATCHES_IN_FLIGHT * batch * 3 * (2 * decoded_pixels + 2 * pixels + 4 * pixels)


@dataclass(frozen=True)
class _Moment:
    """Of a step: parameters whose backward pass is over, elements of gradients by trained tower, and bytes of
    activations of a sample by label."""

    done: int
    gradients: list[int]
    activations: dict[str, int]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on a rank with AdamW, by tower and use.

    ZeRO's sharding is arXiv 1910.02054's, figure 1; the rest is what DeepSpeed 0.19 was seen to keep
    (benchmarks/memory.py): an fp32 copy of the weights from stage 1 on, even of fp32 weights; whole gradients between
    the micro-batches at stage 1; copies of the gradients in the optimizer's step. A frozen tower has its weights, in
    the run's precision, and what its forward pass takes.

    `needs_whole_batch`: the objective sees all micro-batches at once. `has_average`: a moving average of the weights is
    kept.
    """

    towers: Sequence[PlannedTower]
    precision: str
    layout: Layout
    recompute: Recompute = "none"
    buffers: ZeroBuffers = ZeroBuffers()  # noqa: RUF009  frozen
    needs_whole_batch: bool = False
    has_average: bool = False

    def at_peak(self, micro_batch: int, num_micro_batches: int = 1) -> dict[str, int]:
        """At the fullest moment of a step: their sum is the peak."""
        always = self._weights_and_states()
        if is_held := self.needs_whole_batch and num_micro_batches > 1:
            always["micro-batches of the step"] = micro_batch * num_micro_batches * self._held_bytes
        moments = self._moments(micro_batch, num_micro_batches, is_held)
        return always | max(moments, key=lambda parts: sum(parts.values()))

    @property
    def _trained(self) -> list[PlannedTower]:
        return [tower for tower in self.towers if not tower.is_frozen]

    @property
    def _has_autocast(self) -> bool:
        return is_autocast(self.precision, self.layout.zero_stage)

    @property
    def _is_short(self) -> bool:
        """Whether weights and gradients in the engine have 16 bits."""
        return self.precision != "fp32" and not self._has_autocast

    @property
    def _width(self) -> int:
        return 2 if self._is_short else 4

    @property
    def _counts(self) -> list[int]:
        """Parameters of each trained tower on this rank."""
        return [tower.num_on_rank(self.layout.tensor_parallel) for tower in self._trained]

    def _part(self, count: int) -> int:
        """Of so many parameters, those that this rank updates."""
        return count // self.layout.data_parallel if self.layout.zero_stage else count

    def _weights_and_states(self) -> dict[str, int]:
        """What is there all the time."""
        stage, width, buffers, total = self.layout.zero_stage, self._width, self.buffers, sum(self._counts)
        gathered = 0
        if stage == 3 and self.layout.data_parallel > 1:
            gathered = (min(total, buffers.live) + min(total, buffers.prefetched)) * width
        has_fp32_copy = stage > 0 or self._is_short
        parts = {}
        for tower in self.towers:
            if tower.is_frozen:
                parts[f"{tower.label}: weights"] = tower.num_parameters * DTYPES[self.precision].itemsize
                continue
            count = tower.num_on_rank(self.layout.tensor_parallel)
            owned = self._part(count)
            weights = (owned if stage == 3 else count) * width + gathered * count // total
            if self._has_autocast:
                weights += (count - tower.num_looked_up) * 2  # autocast's bf16 copy
            parts[f"{tower.label}: weights"] = weights
            parts[f"{tower.label}: optimizer states"] = owned * (12 if has_fp32_copy else 8)
            if self.has_average:
                parts[f"{tower.label}: average of the weights"] = owned * 4
        return parts

    @property
    def _held_bytes(self) -> int:
        """Of a sample from the first forward pass to the second: what trained towers are given, and each embedding with
        its gradient in fp32."""
        inputs = sum(tower.input_bytes(self._width) for tower in self._trained)
        return inputs + 4 * sum(tower.config.embed_dim * (1 if tower.is_frozen else 2) for tower in self.towers)

    def _moments(self, micro_batch: int, num_micro_batches: int, is_held: bool) -> Iterator[dict[str, int]]:
        """What else there is at the moments of a step that may be the fullest."""
        stage, width, buffers, counts = self.layout.zero_stage, self._width, self.buffers, self._counts
        owned, total = [self._part(count) for count in counts], sum(counts)
        # At stage 3 a bucket has the precision in which gradients travel.
        bucket = min(buffers.in_fp32, total) if self._is_short else 0
        in_buckets = buffers.gradients * (4 if stage == 3 and bucket else width) if stage else 0
        if stage == 0 and self.layout.num_ranks > 1:
            in_buckets = min(buffers.gradients, total) * width
        # Copies of a full bucket: in fp32, and with the parts of several ranks put together.
        reduced = bucket * (4 + (width if stage != 3 and self.layout.data_parallel > 1 else 0))
        earlier = [0] * len(owned)  # gradients of earlier micro-batches
        if stage == 3:
            earlier = owned
        elif num_micro_batches > 1:
            earlier = counts if stage == 1 else owned

        def parts(moment: _Moment) -> dict[str, int]:
            gradients, copied = moment.gradients, reduced if moment.done >= bucket else 0
            if copied and stage == 1:
                gradients = _without_last(gradients, bucket)  # they are in the bucket
            return (
                self._gradients(gradients)
                | {"buckets of gradients": in_buckets + copied if stage else 0}
                | {f"{label}: activations": micro_batch * size for label, size in moment.activations.items()}
            )

        for moment in self._passes(earlier, owned, is_held):
            yield parts(moment)
        if bucket:
            yield parts(_Moment(bucket, earlier, self._activations(bucket)))
        yield self._gradients(owned) | {"buckets of gradients": in_buckets}
        copies = (sum(owned) * width if stage else 0) + (sum(owned) * 4 if self._is_short else 0)
        left = in_buckets if stage == 3 else 0
        yield self._gradients(owned) | {"buckets of gradients": left, "copies of gradients": copies}

    def _passes(self, earlier: list[int], owned: list[int], is_held: bool) -> list[_Moment]:
        """As each backward pass begins, and in the frozen towers' forward pass."""
        trained, counts = self._trained, self._counts
        after = [max(sizes) for sizes in zip(earlier, owned, strict=True)]
        found = []
        for number in reversed(range(len(trained))):
            done = sum(counts[number + 1 :])
            found.append(_Moment(done, earlier[: number + 1] + after[number + 1 :], self._activations(done)))
        if len(trained) == len(self.towers):
            return found
        taken = self._inputs
        for tower in self.towers:
            if tower.is_frozen:
                taken[tower.label] += Activations(tower, self.precision).inference_bytes
            elif not is_held:
                taken[tower.label] += self._kept(tower).kept_bytes
        # Of a batch as a whole they run before the first backward pass: only stage 3 then has room for gradients.
        before = [0] * len(trained) if is_held and self.layout.zero_stage != 3 else earlier
        return [*found, _Moment(0, before, taken)]

    @property
    def _inputs(self) -> dict[str, int]:
        """Bytes of a sample's inputs, by tower."""
        return {tower.label: tower.input_bytes() for tower in self.towers}

    def _kept(self, tower: PlannedTower) -> Activations:
        return Activations(tower, self.precision, self.recompute, self.layout.tensor_parallel, self._has_autocast)

    def _activations(self, done: int) -> dict[str, int]:
        """Bytes of a sample by tower when the backward pass of so many parameters is over; what ran last goes first."""
        taken, is_under_way = self._inputs, False
        left_of_each = _without_last(self._counts, done)
        for tower, count, left in reversed([*zip(self._trained, self._counts, left_of_each, strict=True)]):
            kept = self._kept(tower)
            taken[tower.label] += kept.kept_bytes * left // count
            if left and not is_under_way:
                taken[tower.label] += kept.backward_bytes
                is_under_way = True
        return taken

    def _gradients(self, elements: Sequence[int]) -> dict[str, int]:
        return {
            f"{tower.label}: gradients": size * self._width for tower, size in zip(self._trained, elements, strict=True)
        }


def _without_last(sizes: list[int], taken: int) -> list[int]:
    """What is left of some sizes when so much is taken away, from the last on."""
    left = []
    for size in reversed(sizes):
        left.append(size - min(size, taken))
        taken -= min(size, taken)
    return left[::-1]
