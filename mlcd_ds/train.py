"""What `deepspeed mlcd_ds/train.py ...` starts: the same program as `mlcd train` (stages/train.py)."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this folder's names must not shadow top-level packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mlcd_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
