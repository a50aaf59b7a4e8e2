"""What may stand in a DeepSpeed file: typing errors and wrong types in every section, each told by one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcd_ds.distributed.ds_config import check_filled_config, check_zero_section, choose_accelerator, read_ds_config
from mlcd_ds.distributed.ds_sections import SECTIONS, _models_of_deepspeed
from mlcd_ds.errors import UserError

NAMES = (*SECTIONS, "bf16", "fp16", "zero_optimization", "comms_logger", "compile")


def refusal(tmp_path: Path, config: Any) -> str:
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_ds_config(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 1000 and "\n" not in message
    return message


def test_every_section_is_listed() -> None:
    choose_accelerator()
    assert {*NAMES} == {*SECTIONS, *_models_of_deepspeed()}


@pytest.mark.parametrize("name", NAMES)
def test_typing_errors_and_values_for_sections_are_named(tmp_path: Path, name: str) -> None:
    assert f"unknown key '{name}.enabeld'" in refusal(tmp_path, {name: {"enabeld": True}})
    for value in (3, None, [1], "on"):
        assert f"{name} must be a mapping" in refusal(tmp_path, {name: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"flops_profiler": {"enabled": "perhaps"}}, "flops_profiler.enabled: Input should be a valid boolean"),
        ({"flops_profiler": {"profile_steps": 3}}, "'flops_profiler.profile_steps'. Did you mean profile_step"),
        ({"activation_checkpointing": {"number_checkpoints": "x"}}, "activation_checkpointing.number_checkpoints"),
        ({"activation_checkpointing": {"partitioned_activations": True}}, "Did you mean partition_activations"),
        ({"comms_logger": {"prof_ops": 3}}, "comms_logger.prof_ops"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "data_types.grad_accum_dtype"),
        ({"fp16": {"loss_scale": float("nan")}}, "fp16.loss_scale"),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16 fp16.loss_scale_window must be > 0"),
        ({"fp16": {"strict": True}}, "unknown key 'fp16.strict'"),
        ({"fp16": {"self": 1}}, "unknown key 'fp16.self'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage cannot be "auto"'),
        ({"zero_optimization": {"leaf_module": 3}}, "leaf_module configuration must be a mapping"),
        ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {}}}, "cpu_offload is deprecated"),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, "would spoil the weights: leave it out"),
        ({"steps_per_print": "often"}, "steps_per_print"),
        ({"communication_data_type": "fp64"}, "communication_data_type"),
        ({"gradient_predivide_factor": float("inf")}, "gradient_predivide_factor: Input should be a finite number"),
        ({"train_batch_size": -1}, "train_batch_size"),
        ({"train_batch_size": [1] * 10_000}, "train_batch_size"),
        ('{"bf16": {}, "bf16": {"enabled": true}}', "'bf16' is given twice"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "'enabled' is given twice"),
        ("[" * 100_000, "cannot be read"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, config: Any, message: str) -> None:
    assert message in refusal(tmp_path, config)


def test_absurd_buffers_are_refused() -> None:
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        with pytest.raises(UserError, match="bucket_size is more than 10,000,000,000 elements"):
            check_zero_section({"zero_optimization": {"stage": 3, key: 1e15}}, Path("ds.json"))


def test_sound_sections_pass(tmp_path: Path) -> None:
    config = {
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": None},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": 4},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e8, "offload_param": {"device": "cpu"}},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "gradient_clipping": 1,
        "wall_clock_breakdown": False,
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert read_ds_config(tmp_path / "ds.json") == config


def test_a_folder_or_other_bytes_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path, tmp_path / "ds.json"):
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            read_ds_config(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states requires"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "cannot be simultaneously enabled"),
    ],
)
def test_settings_that_exclude_each_other(config: dict[str, Any], message: str) -> None:
    filled = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    filled |= {"zero_optimization": {"stage": 1}}
    check_filled_config(filled, Path("ds.json"))
    with pytest.raises(UserError, match=f"ds.json: DeepSpeed refuses this file: .*{message}"):
        check_filled_config({**filled, **config}, Path("ds.json"))
