"""The state of a clustering after an iteration, in one file that any number of ranks goes on from.

A safetensors file: centres fp32 [C, E], counts int64 [C], and in its header the history, the key of the work, and a
checksum. Written array by array: the centres of a million clusters are not copied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.numpy import load as load_tensors

from mlcd_ds.artefacts.files import write_atomic
from mlcd_ds.artefacts.readers import decoding, read_bytes
from mlcd_ds.clustering.kmeans import Clustering, Iteration

STATE_NAME = "state.safetensors"


def save_state(path: Path, key: str, clustering: Clustering) -> None:
    """Write centres, counts and history: whole or not at all."""
    arrays = {"centers": clustering.centers_CE.cpu().numpy(), "counts": clustering.counts_C}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"key": key, "history": json.dumps([dataclasses.asdict(i) for i in clustering.history])}
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": _digest(arrays, metadata)}}
    begin = 0
    for name, array in arrays.items():
        kind = {"f4": "F32", "i8": "I64"}[array.dtype.str[1:]]
        offsets = [begin, begin + array.nbytes]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.data.cast("B"))

    write_atomic(path, write)


def load_state(path: Path, key: str) -> Clustering | None:
    """The saved state of this very clustering, or None. Raises UserError when the file is damaged."""
    if not path.exists():
        return None
    fix = "Pass --overwrite to begin from the first iteration."
    content = read_bytes(path, fix)
    with decoding(f"{path} is damaged: it", fix):
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["key"] != key:
            return None
        arrays = load_tensors(content)
        history = tuple(Iteration(**entry) for entry in json.loads(metadata["history"]))
        if _digest(arrays, {"key": key, "history": metadata["history"]}) != metadata["sha256"]:
            raise ValueError("its checksum is another than when it was written")
    return Clustering(torch.from_numpy(arrays["centers"]), arrays["counts"], history)


def _digest(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in ("centers", "counts"):
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B"))
    return digest.hexdigest()
