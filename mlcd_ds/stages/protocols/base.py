"""What a protocol gives to `mlcd evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mlcd_ds.artefacts.html_page import Section


def no_sections() -> list[Section]:
    """Nothing on the page."""
    return []


@dataclass(frozen=True)
class Outcome:
    """What was measured, the same on every rank; `sections` and `files` are made on rank 0 alone."""

    report: Mapping[str, Any]  # entries of report.json
    told: str  # for the log
    task: str | None = None  # as CLIP_benchmark calls it
    metrics: Mapping[str, Any] = field(default_factory=dict)  # of report.json, as CLIP_benchmark calls them
    sections: Callable[[], list[Section]] = no_sections  # of report.html
    files: Mapping[str, Callable[[BinaryIO], object]] = field(default_factory=dict)
