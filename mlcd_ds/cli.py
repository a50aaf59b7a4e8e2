"""`mlcd STAGE ...`: one command for all stages, the same as `python -m mlcd_ds STAGE ...`."""

from __future__ import annotations

import importlib
import os
import sys

from mlcd_ds.errors import EXIT_INTERRUPTED, INTERRUPTED

STAGES = {
    "index": "find the usable images of WebDataset shards",
    "embed": "embed the images with a frozen encoder",
    "cluster": "spherical k-means over the embeddings",
    "assign": "label every image with its nearest centres",
    "tokenizer": "learn a small vocabulary from captions (CLIP's own comes with the package)",
    "train": "train a backbone on the labels (with the deepspeed launcher for many ranks)",
    "evaluate": "kNN and linear probe of a backbone",
    "export": "write the backbone as a Hugging Face folder",
    "plan": "what a run needs: memory a GPU, time, what fits",
}


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:11}{text}" for name, text in STAGES.items()]
        sys.stdout.write("usage: mlcd STAGE [options]\n\nStages, in order (mlcd STAGE --help explains each):\n")
        sys.stdout.write("\n".join(lines) + "\n")
        return 0 if argv else 2
    if argv[0] not in STAGES:
        sys.stderr.write(f"mlcd: error: no stage {argv[0][:100]!r}; there are {', '.join(STAGES)}\n")
        return 2
    try:
        return importlib.import_module(f"mlcd_ds.stages.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:  # during the import, which takes seconds; later the stage handles it
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            sys.stderr.write(INTERRUPTED + "\n")
        return EXIT_INTERRUPTED
