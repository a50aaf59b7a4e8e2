"""What only a GPU can show: one script for one GPU that checks and times everything, in minutes.

  python benchmarks/gpu.py [--json FILE] [--only NAME ...]

A part that fails says so in its figures, the others go on, and the script ends with status 1. Times are medians over
rounds with the device idle before and after; `of_peak` is over the product of two 8192 x 8192 bf16 matrices on the
same GPU in the same run, `of_sheet` over the vendor's dense bf16 figure.

  ceilings      a copy on the device, and that product
  kernels       head (loss and both gradients) and nearest centres by Triton and by torch, in fp32 and bf16, against
                float64; a twin with a wrong margin or wrong centres must be found out
  head          B = 32,768, D = 768, a million classes, r = .1: a step, its passes, memory above the state, and the same
                beside the bare products and beside one softmax over stored logits (a batch that fits)
  host_waits    a step of the head and its optimizer with every host wait an error; a twin with one must be found out
  step_waits    where the host waits in a step of the whole trainer, DeepSpeed's optimizer included
  assign        65,536 rows, D = 768, to a million centres: 1 and 8 nearest, Triton and torch
  lloyd         an iteration of k-means over rows in host memory: beside its bare search
  backbone      ViT-L/14 at 224: forward, backward and AdamW, alone, beside transformers and timm where installed
  pixels        DALI on the GPU against the plain loader
  loader        images/s of the training loader and the evaluation loader, JPEGs of 384 px to 224
  training      `mlcd train --recipe vit_l_14` with a million centres, as users start it: images/s, MFU, waits, memory
                beside `mlcd plan`
  demo          the whole pipeline of `make demo`; then its training goes on from the last checkpoint but one
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import gpu_kernels
import gpu_pipeline
from head import device_name

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.engine.checkpoint import git_commit

PARTS: dict[str, Callable[[], dict]] = {
    "ceilings": gpu_kernels.ceilings,
    "kernels": gpu_kernels.kernels,
    "head": gpu_kernels.head,
    "host_waits": gpu_kernels.host_waits,
    "step_waits": gpu_pipeline.step_waits,
    "assign": gpu_kernels.assign,
    "lloyd": gpu_kernels.lloyd,
    "backbone": gpu_kernels.backbone,
    "pixels": gpu_pipeline.pixels,
    "loader": gpu_pipeline.loader,
    "training": gpu_pipeline.training,
    "demo": gpu_pipeline.demo,
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, after each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--commit", default=git_commit(), help="of this tree, where it has no .git")
    arguments = parser.parse_args()
    result: dict[str, object] = {"device": device_name(), "commit": arguments.commit}
    result["versions"] = library_versions()
    has_failed = False
    for name in arguments.only:
        began = time.monotonic()
        try:
            figures = PARTS[name]()
        except Exception as error:
            figures, has_failed = {"failed": f"{type(error).__name__}: {error}"[:2000]}, True
            traceback.print_exc()
        result[name] = {**figures, "took_s": round(time.monotonic() - began, 1)}
        sys.stdout.write(f"{name}: {json.dumps(result[name], indent=1)}\n")
        sys.stdout.flush()
        gpu_kernels.release()
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
