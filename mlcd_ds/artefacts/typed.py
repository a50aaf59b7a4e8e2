"""Typed models: what is read from YAML, JSON or a command line, checked before it is used."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 12
_SHORT.maxlevel = 3

Freedom = Literal["always", "rates"]


class Frozen(BaseModel):
    """Base of every typed model: immutable, unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def shown(value: Any) -> str:
    """A value as messages quote it: `repr`, with the middle of long ones left out."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a very long {type(value).__name__}"


def free_field(default: Any = ..., *, when: Freedom = "always", **settings: Any) -> Any:
    """A `Field` of a recipe that may change when a run is resumed; changing any other field makes it another run.

    `when`: always; or as long as the learning rates of the steps already done stay as they were.
    """
    return Field(default, json_schema_extra={"free": when}, **settings)


def first_problem(error: ValidationError, location: tuple[int | str, ...] | None = None) -> str:
    """The first entry of a pydantic error as `key: message`; `location`: the key, where it is not pydantic's."""
    problem = error.errors()[0]
    where = ".".join(str(part)[:100] for part in (problem["loc"] if location is None else location))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {shown(problem['input'])})" if where else message


def _encodable(path: Path) -> Path:
    try:
        is_bad = b"\0" in str(path).encode()
    except UnicodeEncodeError:
        is_bad = True
    if is_bad:
        raise ValueError("no file can have this name: it is not UTF-8, or holds a zero byte")
    return path


FilePath = Annotated[Path, AfterValidator(_encodable)]
# Beyond these, threads and memory run out in places that do not say why; no real run comes near.
MAX_THREADS = 512
MAX_BATCH = 2**16
