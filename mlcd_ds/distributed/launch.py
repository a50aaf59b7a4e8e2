"""How this process was started (deepspeed, torchrun, srun or by hand), and the process group that follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError

DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Launch:
    """Place of this process in the job."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's environment variables.

    Inside a Slurm *batch script* (no srun) SLURM_NTASKS is set although only one process runs, so the step's own
    variables decide. Raises UserError naming the variables when they are incomplete or contradict each other.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        defaults = {"LOCAL_RANK": environ["RANK"], "LOCAL_WORLD_SIZE": environ.get("LOCAL_SIZE", "1")}
    elif environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ:
        keys = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "MLCD_LOCAL_SIZE")
        defaults = {"MLCD_LOCAL_SIZE": environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]}
    else:
        return Launch(rank=0, local_rank=0, world_size=1, local_size=1)
    try:
        rank, local_rank, world_size, local_size = (int(environ.get(key, defaults.get(key, ""))) for key in keys)
    except ValueError:
        raise UserError(f"launch: {', '.join(keys[:3])} must all be set to whole numbers.") from None
    if not 0 <= rank < world_size:
        raise UserError(f"launch: {keys[0]}={rank} is not in [0, {keys[2]}={world_size}).")
    if world_size > 1:
        missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in environ]
        if missing:
            raise UserError(
                f"launch: {world_size} processes were started but {' and '.join(missing)} is not set. Export both, as "
                "slurm/launch.sh does: the first host's name, and a free port."
            )
    return Launch(rank, local_rank, world_size, local_size)


def device_of(launch: Launch) -> torch.device:
    """The accelerator of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"launch: local rank {launch.local_rank}, but this process sees {torch.cuda.device_count()} GPUs: start "
            "one rank a GPU (under Slurm: --gpus-per-node, not --gpus-per-task)."
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(launch: Launch, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Group]:
    """Bring up torch.distributed for this job, alone or among many, and take it down again.

    One process gets a group of one rank, so that what follows has a single code path.
    """
    # DeepSpeed, which looks at these later, must see what was found here.
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    os.environ["LOCAL_SIZE"] = str(launch.local_size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, "env://", rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    world = dist.group.WORLD
    assert world is not None
    dist.all_reduce(torch.zeros(1))  # else a rank that ends at once, on a bad option, would keep others from connecting
    try:
        yield Group(world)
    except BaseException:
        if launch.world_size == 1:  # among many, taking the group down would wait for ranks that wait for this one
            dist.destroy_process_group()
        raise
    Group(world).barrier()  # a rank that leaves early would take the rendezvous away from the others
    dist.destroy_process_group()
