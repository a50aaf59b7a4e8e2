"""Embeddings as slices of ranks: every row once, in whole blocks, checked when opened."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from embeddings_maker import all_rows_of, blobs, write_embeddings

from mlcd_ds.clustering.embedding_store import EmbeddingStore, slice_bounds
from mlcd_ds.clustering.row_sampling import Sample
from mlcd_ds.errors import UserError

SHARDS = (301, 1, 118, 0, 402)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings")
    write_embeddings(path, blobs(SHARDS, dim=24, num_blobs=9))
    return path


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 900])
def test_slices_cover_all_rows_once(folder: Path, num_ranks: int) -> None:
    all_rows = all_rows_of(folder).astype(np.float32)
    bounds = [slice_bounds(len(all_rows), num_ranks, rank) for rank in range(num_ranks)]
    assert bounds[0][0] == 0 and bounds[-1][1] == len(all_rows)
    assert all(end == begin for (_, end), (begin, _) in pairwise(bounds))
    sizes = [end - begin for begin, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    if num_ranks > 7:
        return
    stores = [EmbeddingStore(folder, rank, num_ranks) for rank in range(num_ranks)]
    for sample in (None, Sample(0.3, 1)):
        kept = np.arange(len(all_rows)) if sample is None else np.flatnonzero(sample.contains(np.arange(len(all_rows))))
        blocks = [block for store in stores for block in store.blocks(64, sample)]
        assert np.array_equal(torch.cat([numbers for numbers, _ in blocks]), kept)
        assert np.array_equal(torch.cat([rows for _, rows in blocks]).float(), all_rows[kept])
        for store in stores:  # shards of one row or none leave no short blocks
            lengths = [len(rows) for _, rows in store.blocks(64, sample)]
            assert set(lengths[:-1]) <= {64} and lengths[-1] <= 64
    wanted = np.array([0, 300, 301, 302, 419, 420, 821, 5])
    assert np.array_equal(sum(store.pick(wanted) for store in stores), all_rows[wanted])


def test_a_row_is_named_by_its_file(folder: Path) -> None:
    assert EmbeddingStore(folder).place(303) == f"{folder / '00002.npy'} row 1"
    assert EmbeddingStore(folder, 1, 2).place(821) == f"{folder / '00004.npy'} row 401"


def test_reading_does_not_write(folder: Path) -> None:
    before = (folder / "00000.npy").read_bytes()
    _, rows = next(EmbeddingStore(folder).blocks(10))
    rows.zero_()
    assert (folder / "00000.npy").read_bytes() == before


def test_a_damaged_embedding_shard_is_named(tmp_path: Path) -> None:
    write_embeddings(tmp_path, blobs((20, 20), dim=8, num_blobs=2))
    path = tmp_path / "00001.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for damage, match in ((bytes(content), "checksum"), (bytes(content[:-2]), "bytes"), (None, "missing")):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(UserError, match=rf"00001\.npy.*{match}.*mlcd embed --overwrite"):
            EmbeddingStore(tmp_path)
        EmbeddingStore(tmp_path, 0, 2)  # the rank that does not read it


def test_rows_left_out_are_counted_around(folder: Path) -> None:
    store = EmbeddingStore(folder)
    left_out = np.array([0, 1, 5, 300, 821])
    assert store.numbers(np.array([0, 821])).tolist() == [0, 821]
    store.exclude(left_out)
    everything = np.setdiff1d(np.arange(822), left_out)
    assert np.array_equal(store.numbers(np.arange(store.num_rows)), everything)
