"""What a run, and the clustering before it, will need: memory a GPU, time, images/s, what fits.
The plan itself needs no GPU and no data.

  mlcd plan --recipe vit_l_14 --gpus 80 --gpu a100-80gb
  mlcd plan --recipe vit_b_16 --gpus 8 --gpu h100 --zero 2 train.recompute=mlp
  mlcd plan --recipe vit_bigg_14 --gpus 256 --deepspeed_config ds_configs/tp2_zero3_bf16.json

Memory follows from shapes: what ZeRO keeps for AdamW (Muon keeps less), activations counted on two real blocks of each
tower, the head by the formulas of docs/head.md; docs/design.md compares it with what was measured. 5 % of a GPU are to
stay free. Time follows from the operations of forward and backward, an *assumed* share of the GPU's peak (--mfu), and
the bytes that travel over an *assumed* bandwidth (--network): measure yours, and give it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from mlcd_ds.clustering.kmeans_memory import cluster_memory, predicted_seconds
from mlcd_ds.config import Recipe, load_recipe, recipe_names
from mlcd_ds.distributed.ds_config import ZeroBuffers, read_ds_config, zero_buffers
from mlcd_ds.engine.engine_config import read_layout
from mlcd_ds.engine.hardware import GPUS, Gpu
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.phases import phases
from mlcd_ds.engine.planned_towers import planned_towers
from mlcd_ds.engine.precision import decide_precision
from mlcd_ds.engine.run_memory import TrainingMemory, decoding_memory
from mlcd_ds.engine.run_time import StepTime, TowerWork, step_time, step_work, traffic
from mlcd_ds.errors import UserError
from mlcd_ds.models.layers import Recompute
from mlcd_ds.objectives.base import Need, PlannedRun
from mlcd_ds.objectives.registry import kind_of
from mlcd_ds.stages import runner

GIB = 2**30
BUCKETS = {"overlap_comm": True, "reduce_bucket_size": 50_000_000}  # as in ds_configs/
RUNTIME_GIB = 2.0  # CUDA's and NCCL's own: assumed
MARGIN = 0.05  # share of the memory that a plan leaves free, for the allocator's gaps and the plan's own errors
RECOMPUTES: tuple[Recompute, ...] = ("none", "mlp", "block")


@dataclass(frozen=True)
class Job:
    """What is planned: a recipe on GPUs in a layout."""

    recipe: Recipe
    layout: Layout
    gpu_name: str
    num_centers: int
    buffers: ZeroBuffers
    gradient_width: int = 4  # bytes of an element that travels
    overlaps: bool = True

    @property
    def gpu(self) -> Gpu:
        """The kind of GPU."""
        return GPUS[self.gpu_name]

    @property
    def usable_gib(self) -> float:
        """GiB of a GPU that a plan may use."""
        return self.gpu.memory_gib * (1 - MARGIN)

    def memory_gib(self, micro_batch: int, recompute: Recompute) -> dict[str, float]:
        """GiB on one GPU, by what takes it."""
        recipe, layout, train = self.recipe, self.layout, self.recipe.train
        in_phases = (
            TrainingMemory(
                planned_towers(recipe, phase),
                train.precision,
                layout,
                recompute,
                self.buffers,
                needs_whole_batch=kind_of(recipe.objective).sees_whole_batch(recipe),
                has_average=train.ema_decay is not None,
            ).at_peak(micro_batch, self.num_micro_batches(micro_batch))
            for phase in phases(recipe)
        )
        parts = max(in_phases, key=lambda parts: sum(parts.values()))
        parts |= self.objective_need(micro_batch).memory
        largest = max(phase.image_size for phase in phases(recipe))
        parts["DALI (images of 1 megapixel)"] = decoding_memory(micro_batch, largest)
        return {name: size / GIB for name, size in parts.items()} | {"CUDA, NCCL (assumed)": RUNTIME_GIB}

    @property
    def per_rank(self) -> int:
        """Samples of a step on a rank."""
        return self.recipe.train.global_batch // self.layout.data_parallel

    def num_micro_batches(self, micro_batch: int) -> int:
        """Of a step."""
        return -(-self.per_rank // micro_batch)

    def work(self, micro_batch: int, recompute: Recompute) -> list[TowerWork]:
        """Of each tower, for a sample."""
        return step_work(self.recipe, recompute, self.num_micro_batches(micro_batch))

    def objective_need(self, micro_batch: int) -> Need:
        """What the objective needs beside the backbone."""
        layout = self.layout
        run = PlannedRun(layout.num_ranks, layout.tensor_parallel, micro_batch, self.num_centers)
        return kind_of(self.recipe.objective).need(self.recipe, run)

    def time(self, mfu: float | None, between_gb: float | None) -> StepTime:
        """Seconds of a step, on average over the phases."""
        recipe, layout = self.recipe, self.layout
        batches = plan_batches(recipe, layout, 0)
        work = self.work(batches.micro_batch, recipe.train.recompute)
        flops = sum(part.flops_on_rank(layout.tensor_parallel) for part in work) * self.per_rank
        numbers = (batches.num_micro_batches, batches.micro_batch, self.gradient_width, self.overlaps)
        computing = flops / (self.gpu.peak_tflops * 1e12 * (mfu or self.gpu.usual_mfu))
        return step_time(computing, traffic(recipe, layout, work, *numbers), self.gpu, layout.num_ranks, between_gb)

    def largest_micro_batch(self, recompute: Recompute) -> int:
        """The largest micro-batch that fits, of those that divide a rank's part of the batch; 0 when none does."""
        fitting = [0]
        for count in (n for n in range(1, self.per_rank + 1) if self.per_rank % n == 0):
            if sum(self.memory_gib(count, recompute).values()) <= self.usable_gib:
                fitting.append(count)
        return fitting[-1]


def page(job: Job, mfu: float | None, between_gb: float | None = None) -> str:
    """The whole plan as text."""
    recipe, layout, gpu, train = job.recipe, job.layout, job.gpu, job.recipe.train
    batches = plan_batches(recipe, layout, 0)
    micro_batch, per_rank = batches.micro_batch, job.per_rank
    parts = job.memory_gib(micro_batch, train.recompute)
    total = sum(parts.values())
    work = job.work(micro_batch, train.recompute)
    flops = sum(part.flops for part in work)
    share = mfu or gpu.usual_mfu
    time = job.time(mfu, between_gb)
    step_s = time.total
    need = job.objective_need(micro_batch)
    lines = [
        f"{layout.num_ranks} x {job.gpu_name}, ZeRO {layout.zero_stage}, tensor parallel {layout.tensor_parallel}, "
        f"{train.precision}; batch {train.global_batch} = {layout.data_parallel} x {per_rank // micro_batch} x "
        f"{micro_batch}; recompute {train.recompute}",
        "",
        f"{'Towers':32}{'M parameters':>12}{'tokens':>8}   GFLOP a sample: forward, backward, again",
        *(tower_line(part) for part in work),
        "",
        "Memory a GPU, GiB",
        *(f"  {name:32}{size:8.2f}" for name, size in parts.items()),
        f"  {'total':32}{total:8.2f} of {gpu.memory_gib:.0f}, of which {gpu.memory_gib * MARGIN:.1f} are to stay free: "
        f"{'fits' if total <= job.usable_gib else 'DOES NOT FIT'}",
        "",
        "Largest micro-batch that fits, images",
    ]
    least = sum(part.flops for part in job.work(per_rank, "none"))
    for recompute in RECOMPUTES:
        count = job.largest_micro_batch(recompute)
        slower = sum(part.flops for part in job.work(count or micro_batch, recompute)) / least
        lines.append(
            f"  train.recompute={recompute:6} {count:6}   {slower:.2f} x the operations"
            + ("" if count else "; fewer states a GPU: a higher ZeRO stage or more GPUs")
        )
    images = train.steps * train.global_batch
    lines += [
        "",
        f"Time at {100 * share:.0f} % of {gpu.peak_tflops} TFLOP/s ({'given' if mfu else 'assumed'})",
        f"  a step {step_s:8.2f} s   {train.global_batch / step_s:10.0f} images/s in all   "
        f"{train.global_batch / step_s / layout.num_ranks:8.0f} a GPU",
        f"  computing {time.computing:.2f} s; communication {time.communication:.2f} s at "
        f"{between_gb or gpu.between_gb:g} GB/s a GPU between nodes, {gpu.within_gb:g} within, of which "
        f"{time.exposed:.2f} s is not hidden",
        f"  {train.steps} steps, {images / 1e9:.2f} G images: {step_s * train.steps / 86400:8.1f} days",
        f"  {need.what}, {100 * need.flops / (flops * per_rank):.2f} % of the operations",
    ]
    if total > job.usable_gib:
        lines += ["", "To make it fit: a micro-batch of the table above (train.micro_batch_per_rank), or recompute."]
    elif job.largest_micro_batch(train.recompute) > micro_batch:
        lines += ["", "There is room for a larger train.micro_batch_per_rank: fewer, larger products and collectives."]
    return "\n".join(lines)


def tower_line(work: TowerWork) -> str:
    """A row of the page's first table. "again": recomputed, or the forward pass without gradient."""
    tower = work.tower
    name = f"  {tower.label}, {'frozen' if tower.is_frozen else 'trained'}"
    again = (work.num_forwards - 1) * work.forward + work.recomputed
    flops = "".join(f"{value / 1e9:10.2f}" for value in (work.forward, work.backward, again))
    return f"{name:32}{tower.num_parameters / 1e6:12.1f}{work.tokens:8.0f}   {flops}"


def clustering_lines(num_images: int, num_centers: int, dim: int, num_ranks: int) -> list[str]:
    """What `mlcd cluster` takes before the training, on the same GPUs."""
    memory = cluster_memory(num_images, num_centers, dim, num_ranks, torch.device("cuda"), is_bf16=True)
    time = predicted_seconds(num_images, num_centers, dim, num_ranks)
    return [
        "",
        f"Clustering {num_images:,} x {dim} into {num_centers:,} centres, speeds assumed (docs/clustering.md)",
        f"  {sum(memory.values()) / GIB:.2f} GiB a GPU; {num_images * dim * 2 / num_ranks / GIB:.1f} GiB of embeddings "
        "are read by a rank in a pass",
        f"  a pass {time['iteration_s']:.0f} s, its reading {time['reading_s']:.0f} s, collectives "
        f"{time['collectives_s']:.1f} s; all iterations {time['all_h']:.2f} h",
    ]


def positive(text: str) -> int:
    """A whole number from 1 to 10^12."""
    if not 1 <= (value := int(text)) <= 10**12:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 to 10^12")
    return value


def above_zero(text: str) -> float:
    """A number above zero."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return value


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and up to 1")
    return value


def build_parser() -> runner.Parser:
    """The command line of `mlcd plan`."""
    parser = runner.Parser(prog="mlcd plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys, such as train.recompute=mlp")
    parser.add_argument("--recipe", default="vit_l_14", help=f"name or file (there are {', '.join(recipe_names())})")
    parser.add_argument("--gpus", type=positive, default=80, help="how many (default: %(default)s)")
    parser.add_argument("--gpu", choices=GPUS, default="a100-80gb", help="which (default: %(default)s)")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--deepspeed_config", type=Path, help="of the run (ours: ds_configs/)")
    layout.add_argument("--zero", type=int, choices=range(4), default=1, help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--tensor-parallel", type=positive, help="ranks that share a layer (default: the file's, or 1)")
    parser.add_argument("--num-centers", type=positive, default=1_000_000, help="classes (default: %(default)s)")
    parser.add_argument("--num-images", type=positive, default=400_000_000, help="to cluster (default: %(default)s)")
    parser.add_argument("--embedding-dim", type=positive, default=768, help="of the teacher (default: %(default)s)")
    parser.add_argument("--network", type=above_zero, help="GB/s that a GPU sends to other nodes, such as 20")
    parser.add_argument("--mfu", type=share, help="share of the peak that your runs reach, such as 0.41")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the page."""
    path = args.deepspeed_config or Path(f"ZeRO {args.zero}")
    config: dict = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": args.zero, **BUCKETS}}
    config["communication_data_type"] = "fp32"
    if args.deepspeed_config:
        config = read_ds_config(path)
    if args.tensor_parallel:
        config["tensor_parallel"] = {"autotp_size": args.tensor_parallel}
    recipe = decide_precision(load_recipe(args.recipe, tuple(args.overrides)), config, path)
    layout = read_layout(config, path, args.gpus)
    if "offload_param" in config.get("zero_optimization", {}):
        raise UserError(f"{path}: what zero_optimization.offload_param saves is not planned: leave it out here.")
    width = 2 if recipe.train.precision != "fp32" and layout.zero_stage else 4
    if config.get("communication_data_type") == "fp32":
        width = 4
    overlaps = bool(config.get("zero_optimization", {}).get("overlap_comm"))
    job = Job(recipe, layout, args.gpu, args.num_centers, zero_buffers(config, path), width, overlaps)
    lines = []
    if "labels" in kind_of(recipe.objective).fields_of(recipe):  # they come from clusters
        lines = clustering_lines(args.num_images, args.num_centers, args.embedding_dim, args.gpus)
    runner.logger.info("\n".join([page(job, args.mfu, args.network), *lines]))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd plan`."""
    args = build_parser().parse_intermixed_args(argv)
    return runner.guarded(lambda context: run(args))
