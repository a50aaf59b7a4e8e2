"""nCLIP's loss by blocks of rows, beside its plain form.

python benchmarks/nclip.py [--json FILE] [--threads N]

B = 4,096 pairs of embeddings (E = 512), heads of width 512 to K = 32,768 dimensions, fp32, one process: the loss and
all gradients (embeddings and heads) by `Nclip`, and by the paper's formulas under autograd, as anybody would write them
(there is no public code). Times are taken in turn; the ratio is the median of rounds. Memory is the peak of a process
of its own above embeddings and heads; both results hold the heads' gradients, which are taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from head import MIB, peak_memory
from report import report
from torch import Tensor

from mlcd_ds.config import load_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.objectives.nclip import Nclip, nclip_config

BATCH, ROUNDS = 4096, 5
RECIPE = load_recipe("nclip_vit_b_32", ("train.precision=fp32",))
Outputs = dict[str, Tensor]


def make_outputs() -> Outputs:
    """Embeddings of unit length that are partly like their partners, and the heads as a run begins with them."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, RECIPE.model.embed_dim)
    image_BE, noise_BE = (torch.randn(shape, generator=generator) for _ in range(2))
    outputs = {"image": F.normalize(image_BE), "text": F.normalize(image_BE + noise_BE)}
    with torch.no_grad():
        return outputs | Nclip.engine_module(RECIPE)(outputs)


def ours(outputs: Outputs) -> Outputs:
    """The objective of this package."""
    groups = ParallelGroups(Group(dist.group.WORLD))
    return Nclip(RECIPE, SimpleNamespace(), groups, torch.device("cpu"))(outputs, {}).gradients


def plain(outputs: Outputs) -> Outputs:
    """The formulas."""
    config, leaves = nclip_config(RECIPE), {name: tensor.detach().requires_grad_() for name, tensor in outputs.items()}
    logs = []
    for tower, temperature in (("image", config.image_temperature), ("text", config.text_temperature)):
        first, bias, last = (leaves[f"nclip_{tower}_{part}"] for part in ("first", "bias", "last"))
        hidden_BW = F.gelu(F.linear(leaves[tower], first, bias))
        logs.append(F.log_softmax(F.linear(hidden_BW, last) / temperature, dim=1))
    log_p, log_q = logs
    p, q = log_p.exp(), log_q.exp()
    cross = -(q * log_p + p * log_q).sum(dim=1).mean() / 2
    own = -(p * log_p + q * log_q).sum(dim=1).mean() / 2
    of_means = (torch.special.entr(p.mean(dim=0)).sum() + torch.special.entr(q.mean(dim=0)).sum()) / 2
    weights = config.cross_entropy_weight, config.entropy_weight, config.mean_entropy_weight
    (weights[0] * cross + weights[1] * own - weights[2] * of_means).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


FORMS: dict[str, Callable[[Outputs], Outputs]] = {"ours": ours, "plain": plain}


def child(name: str, threads: int) -> None:
    """In a process of its own: the peak of one form, or the times of both."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    outputs, result = make_outputs(), {}
    if name == "times":
        grads = {form: call(outputs) for form, call in FORMS.items()}
        result["difference"] = max(
            float((grads["ours"][key] - grad).norm() / grad.norm()) for key, grad in grads["plain"].items()
        )
        del grads
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(ROUNDS):
            for form, call in FORMS.items():
                begin = time.perf_counter()
                call(outputs)
                times[form].append(time.perf_counter() - begin)
        ratios = [mine / theirs for mine, theirs in zip(times["ours"], times["plain"], strict=True)]
        result |= {f"{form}_s": statistics.median(values) for form, values in times.items()}
        result |= {"ratio": statistics.median(ratios), "ratio_lowest": min(ratios), "ratio_highest": max(ratios)}
    else:
        few = {key: tensor[:64] if key in ("image", "text") else tensor for key, tensor in outputs.items()}
        FORMS[name](few)  # libraries take theirs once
        with peak_memory(result):
            gradients = FORMS[name](outputs)
        result["peak_mib"] -= sum(tensor.numel() for tensor in gradients.values()) * 4 / MIB
    sys.stdout.write(json.dumps(result) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.threads)

    def ask(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", name, "--threads", str(arguments.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    times, peaks = ask("times"), {form: ask(form)["peak_mib"] for form in FORMS}
    config = nclip_config(RECIPE)
    result = {
        "nclip_memory_ratio": peaks["ours"] / peaks["plain"],
        "nclip_time_ratio": times.pop("ratio"),
        **{f"nclip_peak_mib_{form}": peak for form, peak in peaks.items()},
        **{f"nclip_{name}": value for name, value in times.items()},
        "batch": BATCH,
        "dims": config.num_dims,
        "head_width": config.head_width,
        "threads": arguments.threads,
    }
    report(result, arguments.json)
    return None


if __name__ == "__main__":
    main()
