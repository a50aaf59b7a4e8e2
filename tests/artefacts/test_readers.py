"""Readers: what is sound is read, and every damage is one UserError that names file and fix."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlcd_ds.artefacts.files import FileRecord, record_of
from mlcd_ds.artefacts.readers import (
    open_tensors,
    parse_yaml,
    read_array,
    read_bytes,
    read_json,
    read_json_object,
    read_model,
    read_tensors,
    read_yaml,
)
from mlcd_ds.errors import UserError

FIX = "Make it again."
READERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda path: read_json_object(path, FIX),
    "yaml": lambda path: read_yaml(path, FIX),
    "npy": lambda path: read_array(path, FIX),
    "mapped": lambda path: read_array(path, FIX, mmap="r"),
    "safetensors": lambda path: read_tensors(path, FIX),
}


def sound(folder: Path, kind: str) -> Path:
    """A file that the reader of its kind takes."""
    path = folder / f"file.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"a": 1, "b": [1.5, {"c": None}]}))
    elif kind == "yaml":
        path.write_text("a: 1\nb: [1.5, {c: null}]\n")
    elif kind == "safetensors":
        save_file({"a": torch.arange(6.0).view(2, 3)}, path)
    else:
        with open(path, "wb") as file:
            np.save(file, np.arange(6, dtype=np.int32).reshape(2, 3))
    return path


def refusal(path: Path, read: Callable[[Path], Any]) -> str:
    """The message of the one error that a reader may raise."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(FIX) and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_one_message(tmp_path: Path, kind: str) -> None:
    path, read = sound(tmp_path, kind), READERS[kind]
    read(path)
    content = path.read_bytes()
    if kind != "yaml":  # a cut YAML file may be a whole one
        for end in range(0, len(content) - 1, 3):
            path.write_bytes(content[:end])
            refusal(path, read)
    for damaged in (b"", b"\0" * 200, b"\xff\xfe" * 9, b"[" * 200_000, b"PK\x03\x04" + content):
        path.write_bytes(damaged)
        refusal(path, read)
    path.unlink()
    assert "is missing" in refusal(path, read)
    path.mkdir()
    refusal(path, read)


@pytest.mark.parametrize("kind", READERS)
def test_no_mutation_is_a_stack_trace(tmp_path: Path, kind: str) -> None:
    path, read = sound(tmp_path, kind), READERS[kind]
    content, generator = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path, user = sound(tmp_path, kind), os.geteuid()
    path.chmod(0)
    os.seteuid(user or 65534)  # root may read everything
    try:
        assert "ermission" in refusal(path, READERS[kind])
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("kind", READERS)
def test_a_record_is_compared_first(tmp_path: Path, kind: str) -> None:
    readers: dict[str, Callable[[Path, FileRecord], Any]] = {
        "json": lambda path, record: read_json(path, FIX, record),
        "yaml": lambda path, record: read_yaml(path, FIX, record),
        "npy": lambda path, record: read_array(path, FIX, record=record),
        "mapped": lambda path, record: read_array(path, FIX, record=record, mmap="r"),
        "safetensors": lambda path, record: read_tensors(path, FIX, record),
    }
    path = sound(tmp_path, kind)
    record = record_of(path)
    readers[kind](path, record)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(path, lambda path: readers[kind](path, record))
    path.write_bytes(content + b"\n")
    assert "bytes instead of" in refusal(path, lambda path: readers[kind](path, record))


def test_a_key_given_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"a": {"lr": 1, "lr": 2}}')
    assert "'lr' is given twice" in refusal(tmp_path / "a", READERS["json"])
    (tmp_path / "a").write_text("a:\n  lr: 1\n  other: 2\n  lr: 2\n")
    assert "'lr' is given twice" in refusal(tmp_path / "a", READERS["yaml"])
    (tmp_path / "a").write_text("a: {lr: 1}\nb: {lr: 2}\n")
    assert read_yaml(tmp_path / "a", FIX) == {"a": {"lr": 1}, "b": {"lr": 2}}


def test_yaml_aliases_are_read_but_not_bombs(tmp_path: Path) -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}, e: 2}", "here", FIX) == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": 2},
    }
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    assert "aliases" in refusal(path, READERS["yaml"])
    path.write_text("a: &a [*a]")
    assert "aliases" in refusal(path, READERS["yaml"])


@pytest.mark.parametrize("text", ["!!python/object:os.system {}", "a: 2001-99-99", "? [a, {b: c}]\n: d", "a: b: c"])
def test_odd_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    refusal(tmp_path / "a.yaml", READERS["yaml"])


@pytest.mark.parametrize("text", ["", "5", "[1]", "1: 2"])
def test_yaml_must_hold_a_mapping_of_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert "must hold a mapping" in refusal(tmp_path / "a.yaml", READERS["yaml"])


def test_models_name_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"bytes": 5, "sha256": 7}')
    assert "sha256: " in refusal(tmp_path / "a.json", lambda path: read_model(path, FileRecord, FIX))
    (tmp_path / "a.json").write_text("[]")
    assert "must hold" in refusal(tmp_path / "a.json", lambda path: read_model(path, FileRecord, FIX))


def test_arrays_of_another_kind_are_told(tmp_path: Path) -> None:
    path = sound(tmp_path, "npy")
    assert read_array(path, FIX, np.int32, (2, None)).tolist() == [[0, 1, 2], [3, 4, 5]]
    for dtype, shape, told in (
        (np.int64, (2, 3), "int32 [2, 3] instead of int64 [2, 3]"),
        (np.int32, (3, 3), "int32 [2, 3] instead of int32 [3, 3]"),
        (None, (None,), "int32 [2, 3] instead of any type [any]"),
        (np.float32, None, "int32 [2, 3] instead of float32 [...]"),
    ):
        message = refusal(path, lambda path, kind=dtype, size=shape: read_array(path, FIX, kind, size))
        assert re.search(re.escape(told), message), message
    np.save(path, np.array([{}], dtype=object))
    refusal(path, READERS["npy"])


def test_parts_of_tensors(tmp_path: Path) -> None:
    path = sound(tmp_path, "safetensors")
    with open_tensors(path, FIX) as file:
        assert file.names == {"a"} and file.shape("a") == [2, 3]
        assert file.rows("a", 1, 2).tolist() == [[3, 4, 5]] and file.tensor("a").sum() == 15
        refusal(path, lambda path: file.tensor("b"))
    path.write_bytes(path.read_bytes()[:-1])
    refusal(path, lambda path: open_tensors(path, FIX).__enter__())


def test_bytes(tmp_path: Path) -> None:
    assert read_bytes(sound(tmp_path, "yaml"), FIX).startswith(b"a: 1")
