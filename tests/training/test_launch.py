"""What accelerate's configuration asks for is had, or refused by name."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest

from library.config.arguments import TrainingOptions
from library.errors import UserError
from library.memory.sharding import Sharding
from library.training.launch import asked_sharding, check_launch
from library.training.processes import make_accelerator
from library.training.sharding import sharding_for


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP version 1: .*choose version 2 in accelerate config"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed: .*choose FSDP version 2 in accelerate config"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "INDUCTOR"),
    ],
)
def test_what_adapters_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words) as caught:
        make_accelerator(TrainingOptions())
    assert len(str(caught.value).splitlines()) == 1


def test_what_launchers_set_anyway_is_fine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in {"USE_FSDP": "false", "DYNAMO_BACKEND": "NO", "MIXED_PRECISION": "bf16"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_launch(TrainingOptions(mixed_precision="bf16"))
    assert not caplog.records


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that accelerate launch makes for FSDP version 2."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in {
        "VERSION": "2",
        "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "RESHARD_AFTER_FORWARD": "true",
        "OFFLOAD_PARAMS": "false",
        "MIN_NUM_PARAMS": "100000000",
        "STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FORWARD_PREFETCH": "false",
        "USE_ORIG_PARAMS": "true",
        "CPU_RAM_EFFICIENT_LOADING": "true",
        "SYNC_MODULE_STATES": "true",
        "ACTIVATION_CHECKPOINTING": "false",
        "ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    return monkeypatch


def test_settings_of_fsdp_are_those_of_accelerate(fsdp: pytest.MonkeyPatch) -> None:
    check_launch(TrainingOptions())
    assert asked_sharding() == Sharding()
    for name, value in {
        "RESHARD_AFTER_FORWARD": "false",
        "OFFLOAD_PARAMS": "true",
        "TRANSFORMER_CLS_TO_WRAP": "DoubleStreamBlock, SingleStreamBlock",
        "IGNORED_MODULES": "img_in",
    }.items():
        fsdp.setenv(f"FSDP_{name}", value)
    assert asked_sharding() == Sharding(False, True, ("DoubleStreamBlock", "SingleStreamBlock"), "img_in")
    fsdp.setenv("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT")
    with pytest.raises(UserError, match="LOCAL_STATE_DICT.*run accelerate config again"):
        asked_sharding()
    fsdp.setenv("ACCELERATE_USE_FSDP", "false")
    assert asked_sharding() is None


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: .*--gradient_checkpointing"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", "--cpu_offload_checkpointing"),
        ("FSDP_FORWARD_PREFETCH", "true", "fsdp_forward_prefetch"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "SIZE_BASED_WRAP: .*choose TRANSFORMER_BASED_WRAP"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "NO_WRAP: .*choose TRANSFORMER_BASED_WRAP"),
    ],
)
def test_settings_of_fsdp_that_cannot_be(fsdp: pytest.MonkeyPatch, variable: str, value: str, words: str) -> None:
    fsdp.setenv(variable, value)
    with pytest.raises(UserError, match=words) as caught:
        check_launch(TrainingOptions())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["fp8_base", "fp8_base_unet", "torch_compile"])
def test_options_that_fsdp_excludes(fsdp: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=f"--{name}: .*FSDP.*remove one of them"):
        check_launch(TrainingOptions(**{name: True}))


def test_one_process_shares_nothing_out(fsdp: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def accelerator(processes: int, device: str) -> SimpleNamespace:
        return SimpleNamespace(num_processes=processes, device=SimpleNamespace(type=device))

    assert sharding_for(accelerator(1, "cuda"), strict=False) is None
    assert "has no effect with one process" in caplog.text
    with pytest.raises(UserError, match="FSDP"):
        sharding_for(accelerator(1, "cuda"), strict=True)
    assert sharding_for(accelerator(2, "cpu"), strict=True) == Sharding()
    fsdp.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert sharding_for(accelerator(2, "cuda"), strict=True) == Sharding(on_host=True)
    with pytest.raises(UserError, match="fsdp_offload_params: .*set it to false"):
        sharding_for(accelerator(2, "cpu"), strict=False)


def test_accelerates_object_is_that_of_plain_data_parallelism(fsdp: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert make_accelerator(TrainingOptions()).distributed_type != DistributedType.FSDP
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_another_precision_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.WARNING):
        check_launch(TrainingOptions(mixed_precision="no"))
    assert "give --mixed_precision bf16" in caplog.text


def test_accumulation_of_the_environment_does_not_scale_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    try:
        assert make_accelerator(TrainingOptions()).gradient_accumulation_steps == 1
    finally:
        reset()
