"""What devices can, by their compute capability."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from mlcd_ds.distributed.launch import Launch, process_group
from mlcd_ds.errors import UserError
from mlcd_ds.kernels.device import has_bf16, has_triton
from mlcd_ds.stages import train
from mlcd_ds.stages.runner import Context

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize(("capability", "can"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((10, 0), True)])
def test_bf16_came_with_ampere(capability: tuple[int, int], can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bf16(GPU) == has_triton(GPU) == can
    assert has_bf16(CPU)


def test_triton_on_a_cpu_is_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert has_triton(CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not has_triton(CPU)


def test_training_in_bf16_on_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "0")  # to be put back
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    given = Namespace(recipe="demo", overrides=["data.index=null", "data.labels=null"], init_from=None, dry_run=True)
    with process_group(Launch(0, 0, 1, 1)) as group:
        for name in ("zero1_bf16", "zero0_bf16"):
            given.deepspeed_config = DS_CONFIGS / f"{name}.json"
            with pytest.raises(UserError, match=r"train.precision bf16 needs a GPU with bf16.*zero1_fp16.json"):
                train.run(given, Context(group, GPU))
        given.deepspeed_config = DS_CONFIGS / "zero1_fp16.json"
        assert train.run(given, Context(group, GPU)) == 0
