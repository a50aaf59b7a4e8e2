"""What a benchmark leaves: its figures with the commit and the versions that they are of."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.engine.checkpoint import git_commit


def report(figures: Mapping[str, object], path: Path | None) -> None:
    """Print them, and write them to a file where one is named."""
    text = json.dumps({**figures, "commit": git_commit(), "versions": library_versions()}, indent=1) + "\n"
    sys.stdout.write(text)
    if path:
        path.write_text(text)
