"""The head against the plain dense form and against Partial FC called for each of 8 labels.

  python benchmarks/head.py [--json FILE] [--only NAME ...]

Steps are forward, backward and optimizer, on two ranks of one thread each (on a machine with GPUs: one rank, on the
first). Times are ratios of steps made in turn in one run, the median over rounds; memory is the peak of a process of
its own above what it holds before its first step: centres, gradient, moments, inputs.

  compare    B = 2,048, D = 256, C = 200,000, r = .1, l = 8: time and memory beside the dense form, Partial FC with a
             call and a backward for each label (frugal: as users run it), and with one backward for all eight
  rates      memory at r = .1, .5, 1
  million    C = 1,000,000, D = 768, r = .1, B = 4,096
  one_of_80  the shapes of one of 80 ranks: B = 32,768, 12,500 classes of a million, 1,250 sampled
  by_gpus    memory on 1, 8, 80 and 1,024 GPUs by formula, beside one copy of the logits that are not stored
  errors     loss and gradients in fp32 and bf16 against float64
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from head_references import MARGIN, SCALE, DenseMLCD, PartialFCFrugal, PartialFCSummed, Reference
from torch import Tensor

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.checkpoint import git_commit
from mlcd_ds.heads.groups import make_head_groups
from mlcd_ds.heads.head_memory import head_memory, stored_logits
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead
from mlcd_ds.heads.row_optimizer import AdamWRule, RowOptimizer
from mlcd_ds.objectives.class_losses import ClassLoss, ClassLossConfig

NUM_LABELS, ROUNDS = 8, 7
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_RANKS = 1 if DEVICE.type == "cuda" else 2
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class Sizes:
    """Global batch, embedding, classes, sample rate."""

    batch: int
    dim: int
    classes: int
    rate: float


COMPARED = Sizes(2048, 256, 200_000, 0.1)
MILLION = Sizes(4096, 768, 1_000_000, 0.1)


class OurHead:
    """The head and its optimizer behind the references' interface."""

    def __init__(self, sizes: Sizes, group: Group, precision: str, kernel: str = "auto", update: str = "lazy") -> None:
        config = HeadConfig(sample_rate=sizes.rate, precision=precision, kernel=kernel, update=update)
        loss = ClassLoss(ClassLossConfig(scale=SCALE, margin=MARGIN))
        self.head = PartialFCHead(sizes.classes, sizes.dim, config, loss, make_head_groups(group), 0, DEVICE)
        with torch.no_grad():
            self.head.weight_LE.normal_(std=0.01)
        rule = AdamWRule((0.9, 0.98), 1e-6, 0.2)
        self.optimizer = RowOptimizer(self.head, rule, 5.0, is_lazy=update == "lazy")
        self.step_number = 0

    def step(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        self.head.resample(self.step_number)
        emb_grad_BE = self.head(emb_BE, labels_BP).emb_grad_BE
        self.optimizer.step(1e-3)
        self.step_number += 1
        return emb_grad_BE


REFERENCES = {"dense": DenseMLCD, "partial_fc": PartialFCSummed, "partial_fc_frugal": PartialFCFrugal}


def make(name: str, sizes: Sizes, group: Group) -> OurHead | Reference:
    """One of what is compared, with all its state in memory."""
    if name in REFERENCES:
        reference = REFERENCES[name](sizes.classes, sizes.dim, sizes.rate, group, DEVICE)
        reference.weight_LE.grad = torch.zeros_like(reference.weight_LE)
        reference.optimizer.step()  # makes the moments
        return reference
    ours = OurHead(sizes, group, name.removeprefix("ours_"))
    for tensor in (ours.head.grad_LE, *ours.optimizer.state.values()):
        tensor.fill_(1)  # a zeroed tensor takes no memory before its first write
        tensor.zero_()
    return ours


def make_batch(sizes: Sizes, group: Group) -> tuple[Tensor, Tensor]:
    """This rank's random unit embeddings and labels."""
    generator = torch.Generator().manual_seed(group.rank)
    count = sizes.batch // group.size
    emb_BE = F.normalize(torch.randn(count, sizes.dim, generator=generator), dim=1)
    labels_BP = torch.randint(sizes.classes, (count, NUM_LABELS), generator=generator)
    return emb_BE.to(DEVICE), labels_BP.to(DEVICE)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, with the device idle before and after."""
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory(result: dict[str, float]):
    """Adds `peak_mib`: the largest memory within, above that at the beginning."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status_mib("VmRSS")
        yield
        result["peak_mib"] = _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure_times(group: Group, names: list[str], sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each, `ROUNDS` times in turn."""
    heads, batch = {name: make(name, sizes, group) for name in names}, make_batch(sizes, group)
    for head in heads.values():
        head.step(*batch)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, head in heads.items():
            group.barrier()
            times[name].append(seconds(lambda head=head: head.step(*batch)))
    return times


def measure_memory(group: Group, name: str, sizes: Sizes) -> dict[str, float]:
    """Peak over two steps, and what the process holds in all."""
    if DEVICE.type == "cpu":
        # Tensors straight from the system and back: what the allocator keeps would otherwise blur the figure.
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    small = Sizes(64, sizes.dim, 1000, 1.0)
    make(name, small, group).step(*make_batch(small, group))  # libraries, kernels and connections take theirs once
    head, batch = make(name, sizes, group), make_batch(sizes, group)
    result: dict[str, float] = {}
    group.barrier()
    with peak_memory(result):
        head.step(*batch)
        head.step(*batch)
    result["process_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def measure_one_of_80(group: Group, precision: str) -> dict[str, float]:
    """One rank of 80, whose collectives only give buffers of the right size; time over that of its bare products."""
    sizes = Sizes(32_768, 768, 1_000_000, 0.1)
    ours, batch = OurHead(sizes, group, precision), make_batch(sizes, group)
    result: dict[str, float] = {"classes": len(ours.head.classes), "sampled": round(0.1 * len(ours.head.classes))}
    with peak_memory(result):
        ours.step(*batch)
    emb_GE = torch.randn(sizes.batch, sizes.dim, device=DEVICE)
    unit_SE = torch.randn(int(result["sampled"]), sizes.dim, device=DEVICE)
    matmul = ours.head.matmul
    emb_GE, unit_SE = matmul.cast(emb_GE), matmul.cast(unit_SE)

    def products() -> None:
        """The four of a step: logits twice, and the two gradients."""
        with matmul.active():
            for _ in range(2):
                logits_GS = matmul.cast(matmul(emb_GE, unit_SE.T))
            matmul(logits_GS, unit_SE)
            matmul(logits_GS.T, emb_GE)

    products()
    rounds = [(seconds(lambda: ours.step(*batch)), seconds(products)) for _ in range(ROUNDS)]
    result["seconds_per_step"] = statistics.median(step for step, _ in rounds)
    result["time_ratio_vs_bare_products"] = statistics.median(step / bare for step, bare in rounds)
    result["products_tflop"] = 8 * sizes.batch * result["sampled"] * sizes.dim / 1e12
    return result


def measure_errors(group: Group) -> dict[str, dict[str, float]]:
    """Relative errors (Frobenius norm) of loss, embeddings' and centres' gradient against float64, trained-like inputs.

    Each embedding lies near its labels' centres, so that both terms of the loss count.
    """
    sizes = Sizes(512, 768, 20_000, 0.5)
    _, labels_GP = make_batch(sizes, group)
    results = {}
    exact = OurHead(sizes, group, "fp32")
    exact.head.resample(0)
    weight_CE = exact.head.weight_LE.detach().double()
    noise_GE = torch.randn(sizes.batch, sizes.dim, device=DEVICE, dtype=torch.float64)
    near_GE = F.normalize(weight_CE, dim=1)[labels_GP].sum(dim=1) + 2.0 * F.normalize(noise_GE, dim=1)
    emb_GE = F.normalize(near_GE, dim=1).float()
    expected = dense_float64(emb_GE, labels_GP, weight_CE, exact.head.samples[0])
    kernels = ("torch", "triton") if DEVICE.type == "cuda" else ("torch",)
    for precision, kernel in itertools.product(("fp32", "bf16"), kernels):
        ours = OurHead(sizes, group, precision, kernel)
        with torch.no_grad():
            ours.head.weight_LE.copy_(weight_CE)
        ours.head.resample(0)
        output = ours.head(emb_GE, labels_GP)
        ours.head.finish_gradient()
        got = (output.loss, output.emb_grad_BE, ours.head.grad_LE)
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
        results[f"{precision}, {kernel}"] = dict(zip(("loss", "embeddings", "centres"), errors, strict=True))
    return results


def dense_float64(emb_GE: Tensor, labels_GP: Tensor, weight_CE: Tensor, sampled_S: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients by autograd through all logits."""
    emb_GE, weight_CE = emb_GE.double().requires_grad_(), weight_CE.clone().requires_grad_()
    cosines_GC = emb_GE @ F.normalize(weight_CE, dim=1).T
    own_GC = torch.zeros_like(cosines_GC, dtype=torch.bool).scatter(1, labels_GP, True)
    drawn_C = torch.zeros(len(weight_CE), dtype=torch.bool, device=emb_GE.device)
    drawn_C[sampled_S] = True
    n_G = torch.logsumexp((SCALE * cosines_GC).masked_fill(own_GC | ~drawn_C, -torch.inf), dim=1)
    p_G = torch.logsumexp((SCALE * (MARGIN - cosines_GC)).masked_fill(~own_GC, -torch.inf), dim=1)
    loss = (F.softplus(n_G, threshold=700) + F.softplus(p_G, threshold=700)).mean()
    return (loss.detach(), *torch.autograd.grad(loss, (emb_GE, weight_CE)))


def _rank(rank: int, port: int, num_ranks: int, is_fake: bool, work: Callable, args: tuple, results: mp.Queue) -> None:
    torch.manual_seed(rank)
    torch.set_num_threads(1 if DEVICE.type == "cpu" else 8)
    if is_fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=80)
    else:
        backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
        store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=rank == 0)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    result = work(Group(dist.group.WORLD), *args)
    if rank == 0:
        results.put(result)
    if not is_fake:
        dist.barrier()
        dist.destroy_process_group()


def launch(work: Callable, *args: object, num_ranks: int = NUM_RANKS, is_fake: bool = False):
    """`work(group, *args)` on fresh processes; the first rank's result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: mp.Queue = mp.get_context("spawn").Queue()
    context = mp.spawn(_rank, (port, num_ranks, is_fake, work, args, results), nprocs=num_ranks, join=False)
    while not context.join(timeout=0.1):
        if not results.empty():
            break
    result = results.get(timeout=60)
    while not context.join():
        pass
    return result


def compare() -> dict[str, float]:
    """Against the references."""
    names = ["ours_fp32", "ours_bf16", *REFERENCES]
    times = launch(measure_times, names, COMPARED)
    memory = {name: launch(measure_memory, name, COMPARED)["peak_mib"] for name in names}

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    return {
        **{f"speedup_vs_{name}": ratio(name, "ours_fp32") for name in ("partial_fc", "partial_fc_frugal")},
        **{f"speedup_vs_{name}_bf16": ratio(name, "ours_bf16") for name in ("partial_fc", "partial_fc_frugal")},
        "time_ratio_vs_dense": ratio("ours_fp32", "dense"),
        "time_ratio_vs_dense_bf16": ratio("ours_bf16", "dense"),
        **{f"memory_ratio_vs_{name}": memory["ours_fp32"] / memory[name] for name in REFERENCES},
        **{f"peak_mib_{name}": value for name, value in memory.items()},
    }


def rates() -> dict[str, float]:
    """Extra memory at three rates."""
    peaks = {}
    for rate in (0.1, 0.5, 1.0):
        sizes = Sizes(COMPARED.batch, COMPARED.dim, COMPARED.classes, rate)
        peaks[f"peak_mib_r_{rate}"] = launch(measure_memory, "ours_fp32", sizes)["peak_mib"]
    return {**peaks, "memory_growth_over_rates": max(peaks.values()) / min(peaks.values())}


def by_gpus() -> dict[str, dict[str, float]]:
    """MiB by the formulas of mlcd_ds/heads/head_memory.py, for the paper's job on several numbers of GPUs."""
    table = {}
    for num_ranks in (1, 8, 80, 1024):
        parts = head_memory(num_ranks, 1_000_000, 768, 32_768, NUM_LABELS)
        logits = stored_logits(num_ranks, 1_000_000, 0.1, 32_768)
        table[str(num_ranks)] = {name: round(value / MIB, 1) for name, value in {**parts, "logits": logits}.items()}
    return table


PARTS: dict[str, Callable[[], dict]] = {
    "compare": compare,
    "rates": rates,
    "million": lambda: launch(measure_memory, "ours_fp32", MILLION),
    "one_of_80": lambda: {p: launch(measure_one_of_80, p, num_ranks=1, is_fake=True) for p in ("fp32", "bf16")},
    "by_gpus": by_gpus,
    "errors": lambda: launch(measure_errors, num_ranks=1),
}


def device_name() -> str:
    """What the figures were measured on."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def run_parts(description: str | None, parts: dict[str, Callable[[], dict]], flat: tuple[str, ...]) -> None:
    """The command line of a benchmark in parts: measure, print, write. Figures of `flat` parts come without a name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="some of the parts")
    arguments = parser.parse_args()
    result: dict[str, object] = {}
    for name in arguments.only:
        figures = parts[name]()
        result |= figures if name in flat else {name: figures}
        sys.stdout.write(f"{name}: {json.dumps(figures, indent=1)}\n")
        sys.stdout.flush()
    result |= {"device": device_name(), "ranks": NUM_RANKS, "commit": git_commit(), "versions": library_versions()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_parts(__doc__, PARTS, flat=("compare",))
