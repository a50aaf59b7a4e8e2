"""Which sample comes when, how it is cropped, and that batches carry the right pixels and labels."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_maker import (
    PaintedShards,
    number_of,
    paint_shards,
    plain_shard,
    read_independently,
    run_stage,
    write_labels,
)

from mlcd_ds.data import reference
from mlcd_ds.data.crops import random_boxes
from mlcd_ds.data.dali import EncodedBatch
from mlcd_ds.data.fields import Labels, TrainingData
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.loader import AugmentConfig, Batch, StreamSlice, TrainLoader
from mlcd_ds.data.order import SampleOrder, mix64, uniforms
from mlcd_ds.data.pixels import PixelFormat, center_square, clip_pixels
from mlcd_ds.data.shard_index import ShardIndex

NUM_STREAMS = 12
PER_STREAM_STEP = 4  # samples of a stream in an optimizer step
GREY_LEVELS = center_square(8, (0.0,) * 3, (1.0,) * 3)
AREA, ASPECT = (0.4, 1.0), (0.75, 1.3333)


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> PaintedShards:
    """Indexed shards of one-coloured images, with broken ones between them, and labels for them."""
    return paint_shards(tmp_path_factory.mktemp("painted"))


def make_order(counts: tuple[int, ...] = (97, 3, 0, 250, 160, 1, 80), window: int = 16, seed: int = 5) -> SampleOrder:
    return SampleOrder(np.array(counts), NUM_STREAMS, window, seed)


def epoch_ids(order: SampleOrder, epoch: int) -> np.ndarray:
    """int64 [streams, samples per stream]."""
    length = order.samples_per_stream
    return np.stack([order.global_ids(stream, epoch * length, length)[0] for stream in range(order.num_streams)])


def slice_of(rank: int, num_ranks: int, num_micro_batches: int = 1) -> StreamSlice:
    streams = tuple(range(rank * NUM_STREAMS // num_ranks, (rank + 1) * NUM_STREAMS // num_ranks))
    return StreamSlice(streams, PER_STREAM_STEP, num_micro_batches)


@pytest.mark.parametrize("window", [1, 16, 10_000])
def test_an_epoch_has_each_sample_at_most_once_and_nearly_all(window: int) -> None:
    order, left_out = make_order(window=window), []
    for epoch in range(6):
        ids = epoch_ids(order, epoch).ravel()
        assert len(np.unique(ids)) == len(ids) and 0 <= ids.min() and ids.max() < order.num_samples
        assert order.num_samples - len(ids) < NUM_STREAMS
        left_out.append(frozenset(range(order.num_samples)) - frozenset(ids.tolist()))
    assert len(set(left_out)) > 1, "the remainder is the same samples in each epoch"


def test_a_single_shard_leaves_out_other_samples_in_each_epoch() -> None:
    order = make_order((605,))
    missing = [set(range(605)) - set(epoch_ids(order, epoch).ravel().tolist()) for epoch in range(6)]
    assert {len(samples) for samples in missing} == {5}
    assert len(set().union(*missing)) > 15


def test_epochs_and_seeds_differ() -> None:
    order = make_order()
    first, second = epoch_ids(order, 0), epoch_ids(order, 1)
    assert (first == second).mean() < 0.05
    assert (first == epoch_ids(make_order(seed=6), 0)).mean() < 0.05
    assert np.array_equal(first, epoch_ids(make_order(), 0))


def test_random_access_is_sequential_access() -> None:
    order, whole = make_order(), []
    for epoch in range(3):
        whole.append(epoch_ids(order, epoch))
    row = np.concatenate(whole, axis=1)  # streams x consumed samples
    generator = np.random.default_rng(0)
    for _ in range(200):
        stream, start = int(generator.integers(NUM_STREAMS)), int(generator.integers(row.shape[1]))
        count = int(generator.integers(1, row.shape[1] - start + 1))
        ids, epochs = make_order().global_ids(stream, start, count)
        assert np.array_equal(ids, row[stream, start : start + count])
        assert np.array_equal(epochs, np.arange(start, start + count) // order.samples_per_stream)


def test_windows_stay_local() -> None:
    counts, window = (40,) * 50, 32
    order = make_order(counts, window)
    for stream in range(NUM_STREAMS):
        ids, _ = order.global_ids(stream, 0, order.samples_per_stream)
        for begin in range(0, len(ids), window):
            shards, _ = order.locate(ids[begin : begin + window])
            # At most ceil(window / shard) + 1 shards, and one more where the row of shards wraps round.
            assert len(np.unique(shards)) <= 3
    scattered = make_order(counts, 10_000).global_ids(0, 0, window)[0]
    assert len(np.unique(scattered // 40)) > 3, "known-bad twin: a window without bound is not local"


def test_windows_are_shuffled() -> None:
    order = make_order((2000,), window=100)
    ids, _ = order.global_ids(0, 0, 100)
    assert np.array_equal(np.sort(ids), np.arange(ids.min(), ids.min() + 100)) and (np.diff(ids) == 1).mean() < 0.1


def test_locate_skips_empty_shards() -> None:
    order = make_order((0, 3, 0, 0, 2, 0))
    shards, rows = order.locate(np.arange(5))
    assert shards.tolist() == [1, 1, 1, 4, 4] and rows.tolist() == [0, 1, 2, 0, 1]


# Random numbers


def test_mix64_is_splitmix64() -> None:
    # The first outputs of splitmix64 seeded with 1234567 (Vigna's reference implementation).
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(3)], np.uint64)
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def assert_uniform(draws: np.ndarray, slack: float = 0.0) -> None:
    """Range, mean, variance and the Kolmogorov-Smirnov distance (1.95: one in a thousand) of numbers in [0, 1)."""
    number = draws.size
    assert -slack <= draws.min() and draws.max() < 1 + slack
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * number)
    assert abs(draws.var() - 1 / 12) < 4 / np.sqrt(180 * number)
    distance = np.abs(np.sort(draws.ravel()) - (np.arange(number) + 0.5) / number).max()
    assert distance * np.sqrt(number) < 1.95, distance


def test_uniforms_look_uniform_along_each_argument() -> None:
    ids = np.arange(20_000)
    assert_uniform(uniforms(0, 0, ids, 1))
    assert_uniform(uniforms(0, 0, ids[:1], 20_000))
    assert_uniform(np.concatenate([uniforms(0, epoch, ids[:1], 2) for epoch in range(5000)]))
    assert_uniform(np.concatenate([uniforms(seed, 0, ids[:1], 2) for seed in range(5000)]))
    with pytest.raises(AssertionError):
        assert_uniform(uniforms(0, 0, ids, 1) ** 1.1)  # known-bad twin


def test_uniforms_depend_on_each_argument_and_on_nothing_else() -> None:
    ids = np.arange(4000)
    base = uniforms(3, 4, ids, 5)
    for other in (
        uniforms(4, 4, ids, 5),
        uniforms(3, 5, ids, 5),
        uniforms(4, 3, ids, 5),
        uniforms(3, 4, ids + 4000, 5),
    ):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(base.size)
        assert not np.isin(other, base).any()
    columns = np.corrcoef(base.T) - np.eye(5)
    assert np.abs(columns).max() < 5 / np.sqrt(len(ids))
    assert abs(np.corrcoef(base[1:, 0], base[:-1, 0])[0, 1]) < 4 / np.sqrt(len(ids))
    assert np.array_equal(uniforms(3, 4, ids[[70, 2, 900]], 3), base[[70, 2, 900], :3])


# Crops

SIZES = [
    (1, 1),
    (1, 400),
    (400, 1),
    (2, 3),
    (7, 3000),
    (3000, 7),
    (128, 128),
    (333, 500),
    (65_000, 2),
    (59_999, 59_999),
]


def assert_inside(boxes: np.ndarray, sizes: np.ndarray) -> None:
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


@pytest.mark.parametrize("area", [(0.7, 1.0), (0.01, 0.02), (1.0, 1.0)])
@pytest.mark.parametrize("aspect", [(0.75, 1.3333), (1.0, 1.0), (0.01, 100.0), (0.3, 0.6), (1.7, 3.0)])
def test_crops_lie_inside_images_of_any_size(area: tuple[float, float], aspect: tuple[float, float]) -> None:
    sizes = np.array(SIZES * 200, dtype=np.int32)
    boxes, _ = random_boxes(sizes, np.arange(len(sizes)), 0, 0, area, aspect)
    assert_inside(boxes, sizes)


def test_crops_have_the_promised_distribution() -> None:
    number, side = 20_000, 20_000
    sizes = np.full((number, 2), side, np.int32)
    area, aspect = (0.2, 0.5), (0.75, 1.3333)  # always fits into a square, so nothing is drawn again
    boxes, flips = random_boxes(sizes, np.arange(number), 0, 0, area, aspect)
    top, left, height, width = boxes.astype(np.float64).T
    slack = 4 / side  # whole pixels
    assert_uniform((height * width / side**2 - area[0]) / (area[1] - area[0]), slack)
    assert_uniform((np.log(width / height) - np.log(aspect[0])) / np.log(aspect[1] / aspect[0]), slack)
    assert_uniform((top + 0.5) / (side - height + 1))
    assert_uniform((left + 0.5) / (side - width + 1))
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(number) and set(flips.tolist()) == {0, 1}
    pairs = np.corrcoef([height * width, width / height, top / (side - height), left / (side - width), flips])
    assert np.abs(pairs - np.eye(5)).max() < 5 / np.sqrt(number)


def test_crops_reach_every_place_up_to_the_last_pixel() -> None:
    sizes = np.full((9000, 2), 4, np.int32)
    boxes, _ = random_boxes(sizes, np.arange(9000), 0, 0, (9 / 16, 9 / 16), (1.0, 1.0))
    assert (boxes[:, 2:] == 3).all()
    places, counts = np.unique(boxes[:, :2], axis=0, return_counts=True)
    assert places.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert np.abs(counts - 2250).max() < 4 * np.sqrt(9000 * 0.25 * 0.75)


def test_crops_that_never_fit_fall_back_to_the_largest_allowed() -> None:
    sizes = np.array([(10, 1000), (1000, 10)], np.int32)
    boxes, _ = random_boxes(sizes, np.arange(2), 0, 0, (1.0, 1.0), (0.5, 2.0))
    assert boxes.tolist() == [[0, 490, 10, 20], [490, 0, 20, 10]]


def test_a_crop_does_not_depend_on_its_batch() -> None:
    sizes, ids = np.array(SIZES * 20, np.int32), np.arange(200) * 7
    boxes, flips = random_boxes(sizes, ids, 3, 1, AREA, ASPECT)
    for part in (slice(0, 1), slice(50, 90), slice(199, 200)):
        part_boxes, part_flips = random_boxes(sizes[part], ids[part], 3, 1, AREA, ASPECT)
        assert np.array_equal(part_boxes, boxes[part]) and np.array_equal(part_flips, flips[part])
    assert not np.array_equal(random_boxes(sizes, ids, 4, 1, AREA, ASPECT)[0], boxes)


# The loader


def load(
    painted: PaintedShards,
    part: StreamSlice,
    first_step: int,
    num_micro_batches: int,
    pixels: PixelFormat = GREY_LEVELS,
) -> list[Batch]:
    index = ShardIndex(painted.index)
    loader = TrainLoader(
        TrainingData(index, {"labels": Labels(LabelStore(painted.labels, index))}),
        SampleOrder(index.counts, NUM_STREAMS, 8, seed=1),
        part,
        pixels,
        AugmentConfig(crop_area=AREA, crop_aspect=ASPECT),
        torch.device("cpu"),
        num_threads=1,
    )
    batches = loader.batches(first_step)
    got = [
        Batch(b.images_B3SS.clone(), {"labels": b.fields["labels"].clone()}, b.ids_B.clone(), b.keys_B.clone())
        for b in islice(batches, num_micro_batches)
    ]
    batches.close()
    loader.close()
    return got


def assert_labels_belong_to_images(batches: list[Batch]) -> list[int]:
    """Each image is of one colour, which names it; returns the images' numbers."""
    numbers = [number_of(image) for batch in batches for image in batch.images_B3SS.numpy()]
    labels = [row for batch in batches for row in batch.fields["labels"].tolist()]
    assert labels == [PaintedShards.label_of(number) for number in numbers]
    return numbers


def test_the_index_of_painted_shards_is_as_painted(painted: PaintedShards) -> None:
    assert tuple(ShardIndex(painted.index).counts) == painted.counts
    assert ShardIndex(painted.index).num_images == painted.num_images == 181


def test_labels_belong_to_the_very_image_and_an_epoch_sees_all(painted: PaintedShards) -> None:
    per_stream = painted.num_images // NUM_STREAMS
    num_steps = -(-2 * per_stream // PER_STREAM_STEP)  # two epochs and a bit
    batches = load(painted, slice_of(0, 1), 0, num_steps)
    numbers = np.array(assert_labels_belong_to_images(batches)).reshape(num_steps, NUM_STREAMS, PER_STREAM_STEP)
    streams = numbers.transpose(1, 0, 2).reshape(NUM_STREAMS, -1)
    for epoch in range(2):
        seen = streams[:, epoch * per_stream : (epoch + 1) * per_stream].ravel()
        assert len(np.unique(seen)) == len(seen) > painted.num_images - NUM_STREAMS
    batches[1].fields["labels"][[0, 1]] = batches[1].fields["labels"][[1, 0]]
    with pytest.raises(AssertionError):
        assert_labels_belong_to_images(batches)  # known-bad twin: two labels exchanged


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(painted: PaintedShards, num_ranks: int) -> None:
    one = load(painted, slice_of(0, 1), 2, 5)
    ranks = [load(painted, slice_of(rank, num_ranks), 2, 5) for rank in range(num_ranks)]
    for step, whole in enumerate(one):
        assert torch.equal(torch.cat([rank[step].images_B3SS for rank in ranks]), whole.images_B3SS)
        assert torch.equal(torch.cat([rank[step].fields["labels"] for rank in ranks]), whole.fields["labels"])
        assert torch.equal(torch.cat([rank[step].keys_B for rank in ranks]), whole.keys_B)
        assert torch.equal(torch.cat([rank[step].ids_B for rank in ranks]), whole.ids_B)
        assert len(whole.keys_B.unique()) == len(whole.keys_B)
    assert not torch.equal(ranks[0][0].fields["labels"], ranks[1][0].fields["labels"])


@pytest.mark.parametrize("flip", [True, False])
def test_pixels_are_those_of_the_plain_loader(tmp_path: Path, flip: bool) -> None:
    """What rank 1 of 3 gets, from the tars as webdataset reads them and the crops drawn for these samples."""
    shards = [plain_shard(tmp_path / "shards" / f"{number}.tar", 40, seed=number) for number in range(2)]
    assert run_stage("index", "--shards", *shards, "--out", tmp_path / "index").status == 0
    index = ShardIndex(tmp_path / "index")
    write_labels(tmp_path / "labels", index, [np.zeros((40, 2), np.int32)] * 2)
    files = [sample["jpg"] for shard in shards for sample in read_independently(shard)]
    order, part, pixels = SampleOrder(index.counts, NUM_STREAMS, 8, seed=1), slice_of(1, 3), clip_pixels(32)
    augment = AugmentConfig(crop_area=AREA, crop_aspect=ASPECT, flip=flip)
    loader = TrainLoader(TrainingData(index, {}), order, part, pixels, augment, torch.device("cpu"), 1)
    batches = loader.batches(first_step=1)
    images = next(batches).images_B3SS
    batches.close()
    loader.close()
    drawn = [order.global_ids(stream, PER_STREAM_STEP, PER_STREAM_STEP) for stream in part.streams]
    ids, epochs = (np.concatenate(column) for column in zip(*drawn, strict=True))
    assert set(epochs.tolist()) == {0, 1}, "the step is meant to cross an epoch"

    def wanted(ids: np.ndarray, epochs: np.ndarray) -> torch.Tensor:
        size = np.array([[40, 40]])
        boxes, flips = zip(
            *(random_boxes(size, ids[[n]], int(epochs[n]), 1, AREA, ASPECT) for n in range(len(ids))), strict=True
        )
        encoded = [files[number] for number in ids]
        return reference.load(EncodedBatch(encoded, np.concatenate(boxes), flip * np.concatenate(flips)), pixels)

    level = 1.01 / min(pixels.std)
    assert (images - wanted(ids, epochs)).abs().max() < level
    for twin in (wanted(ids, 0 * epochs), wanted(np.roll(ids, 1), epochs)):
        assert (images - twin).abs().max() > 10 * level


def test_micro_batches_make_up_the_same_step(painted: PaintedShards) -> None:
    whole = load(painted, slice_of(0, 1), 1, 3)
    halves = load(painted, slice_of(0, 1, num_micro_batches=2), 1, 6)
    for step in range(3):
        parts = [half.fields["labels"] for half in halves[2 * step : 2 * step + 2]]
        assert torch.equal(torch.cat(parts), whole[step].fields["labels"])
        assert not torch.equal(torch.cat(parts[::-1]), whole[step].fields["labels"])


def test_starting_at_step_k_is_the_tail_of_starting_at_zero(painted: PaintedShards) -> None:
    pixels = center_square(24, (100.0, 110.0, 120.0), (60.0, 61.0, 62.0))
    whole = load(painted, slice_of(1, 2, 2), 0, 14, pixels)
    for first_step in (1, 3, 6):
        tail = load(painted, slice_of(1, 2, 2), first_step, 2, pixels)
        for got, wanted in zip(tail, whole[2 * first_step :], strict=False):
            assert torch.equal(got.images_B3SS, wanted.images_B3SS)
            assert torch.equal(got.fields["labels"], wanted.fields["labels"])


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 4, 6, 12, 24])
def test_micro_batches_cut_a_ranks_part_of_each_step_into_equal_pieces(num_micro_batches: int) -> None:
    part = StreamSlice((2, 3, 4), samples_per_stream_step=8, num_micro_batches=num_micro_batches)
    for step in (0, 5):
        spans = [part.spans(step * num_micro_batches + number) for number in range(num_micro_batches)]
        assert {sum(count for _, _, count in span) for span in spans} == {part.micro_batch} == {24 // num_micro_batches}
        samples = [(stream, first + i) for span in spans for stream, first, count in span for i in range(count)]
        assert samples == [(stream, step * 8 + i) for stream in (2, 3, 4) for i in range(8)]
