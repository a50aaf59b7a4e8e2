"""Reading JSON, YAML, NumPy arrays and safetensors: whatever is wrong with a file becomes one UserError.

`fix` ends the message: a sentence that says what the user should do. With a `record` size and checksum are compared
before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mlcd_ds.artefacts.files import FileRecord, sha256_of
from mlcd_ds.artefacts.typed import first_problem
from mlcd_ds.errors import UserError

MAX_YAML_NODES = 100_000  # with aliases written out: a few lines of them can stand for billions
Shape = Sequence[int | None]  # None: any size
ModelType = TypeVar("ModelType", bound=BaseModel)


@contextmanager
def decoding(what: object, fix: str) -> Iterator[None]:
    """Any error inside becomes a UserError "WHAT cannot be read: ... FIX". Wrap the decoder's call alone."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{what} is missing. {fix}") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or brief(error)}. {fix}") from None
    except Exception as error:  # decoders raise many kinds for damaged files, RecursionError and MemoryError too
        raise UserError(f"{what} cannot be read: {brief(error)}. {fix}") from None


def brief(error: Exception) -> str:
    """An error in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def is_there(path: Path, fix: str) -> bool:
    """Whether a path exists. UserError where a missing permission hides the answer."""
    with decoding(path, fix):
        return path.exists()


def read_bytes(path: Path, fix: str, record: FileRecord | None = None) -> bytes:
    """A file's content, compared with its record."""
    if record is not None:
        check_size(path, record, fix)
    with decoding(path, fix):
        content = path.read_bytes()
    if record is not None:
        _check_digest(path, hashlib.sha256(content).hexdigest(), record, fix)
    return content


def check_record(path: Path, record: FileRecord, fix: str) -> None:
    """Compare size and checksum of a file that is then read in parts."""
    check_size(path, record, fix)
    with decoding(path, fix):
        digest = sha256_of(path)
    _check_digest(path, digest, record, fix)


def check_size(path: Path, record: FileRecord, fix: str) -> None:
    """Compare only a file's size: cheap, and enough where its reader compares the checksum."""
    with decoding(path, fix):
        size = path.stat().st_size
    if size != record.bytes:
        raise UserError(f"{path} has {size} bytes instead of {record.bytes}: it was changed or cut. {fix}")


def _check_digest(path: Path, digest: str, record: FileRecord, fix: str) -> None:
    if digest != record.sha256:
        raise UserError(f"{path}: its checksum is another than when it was written: it was changed or damaged. {fix}")


# JSON and YAML


def parse_json(content: bytes, what: object, fix: str, unique_keys: bool = False) -> Any:
    """Decode JSON. `unique_keys` refuses a key that is given twice: its first value would be lost silently."""
    with decoding(what, fix):
        return json.loads(content, object_pairs_hook=_unique if unique_keys else None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def read_json(path: Path, fix: str, record: FileRecord | None = None) -> Any:
    """A JSON file, in which no key is given twice."""
    return parse_json(read_bytes(path, fix, record), path, fix, unique_keys=True)


def read_json_object(path: Path, fix: str, record: FileRecord | None = None) -> dict[str, Any]:
    """A JSON file that holds an object."""
    content = read_json(path, fix, record)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object. {fix}")
    return content


def read_model(path: Path, kind: type[ModelType], fix: str, record: FileRecord | None = None) -> ModelType:
    """A JSON file as a typed model."""
    content = read_json_object(path, fix, record)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}. {fix}") from None


class _Loader(yaml.SafeLoader):  # the loader in C dies of deep nesting
    """Refuses a key that is given twice, and aliases that stand for more than a file should hold."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _num_nodes(node, {}) > MAX_YAML_NODES:
            raise ValueError(f"with its aliases written out it has more than {MAX_YAML_NODES} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise ValueError(f"line {node.start_mark.line + 1} and after: key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def _num_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of nodes of a YAML tree with aliases expanded; infinite where an alias lies inside what it names."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        below = node.value if not isinstance(node, yaml.MappingNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_num_nodes(n, known) for n in below))
    return known[id(node)]


def parse_yaml(content: str | bytes, what: object, fix: str) -> Any:
    """Decode YAML: plain values only, no key twice."""
    with decoding(what, fix):
        return yaml.load(content, Loader=_Loader)


def read_yaml(path: Path, fix: str, record: FileRecord | None = None) -> dict[str, Any]:
    """A YAML file that holds a mapping, in which no key is given twice."""
    content = parse_yaml(read_bytes(path, fix, record), path, fix)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must hold a mapping of names to values. {fix}")
    return content


# Arrays and tensors


def read_array(
    path: Path,
    fix: str,
    dtype: type | None = None,
    shape: Shape | None = None,
    record: FileRecord | None = None,
    mmap: Literal["r", "c"] | None = None,
) -> np.ndarray:
    """A .npy file, of the dtype and shape that are expected (None: any). `mmap` maps it instead of reading it whole."""
    if mmap is None:
        source: Any = io.BytesIO(read_bytes(path, fix, record))
    else:
        source = path
        if record is not None:
            check_record(path, record, fix)
    with decoding(path, fix):
        array = np.load(source, mmap_mode=mmap, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("not an array")
    is_expected = shape is None or _matches(array.shape, shape)
    if not is_expected or (dtype is not None and array.dtype != dtype):
        wanted = f"{np.dtype(dtype).name if dtype else 'any type'} {_text(shape) if shape is not None else '[...]'}"
        raise UserError(f"{path} holds {array.dtype.name} {_text(array.shape)} instead of {wanted}. {fix}")
    return array


def _matches(found: Sequence[int], wanted: Shape) -> bool:
    return len(found) == len(wanted) and all(w in (None, f) for f, w in zip(found, wanted, strict=True))


def _text(shape: Shape) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def read_tensors(path: Path, fix: str, record: FileRecord | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if record is not None:
        check_record(path, record, fix)
    with decoding(path, fix):
        open(path, "rb").close()  # safetensors says "no such file" of a file without read permission
        return load_file(path)


class TensorFile:
    """An open safetensors file, to read single tensors or parts of them."""

    def __init__(self, path: Path, file: Any, fix: str) -> None:
        self.path, self._file, self._fix = path, file, fix
        self.names = frozenset(file.keys())

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        with decoding(self.path, self._fix):
            return self._file.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, from the file's header."""
        with decoding(self.path, self._fix):
            return self._file.get_slice(name).get_shape()

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a tensor."""
        with decoding(self.path, self._fix):
            return self._file.get_slice(name)[begin:end]


@contextmanager
def open_tensors(path: Path, fix: str) -> Iterator[TensorFile]:
    """Open a safetensors file to read parts of it."""
    with decoding(path, fix):
        open(path, "rb").close()
        opened = safe_open(path, framework="pt")
    with opened as file:
        yield TensorFile(path, file, fix)
