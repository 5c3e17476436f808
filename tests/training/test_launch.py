"""The requests of accelerate's configuration are met, or refused by name."""

from __future__ import annotations

import base64
import json
import logging
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.config.arguments import TrainingOptions
from library.errors import NoEffect, UserError
from library.memory.sharding import Sharding
from library.optim.optimizers import OptimizerChoice
from library.optim.zero import Zero
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.launch import asked_sharding, check_launch
from library.training.processes import make_accelerator
from library.training.sharding import sharding_for
from library.training.zero import asked_zero, check_zero

PLAIN = TrainingOptions()


def processes(count: int, device: str = "cuda") -> SimpleNamespace:
    """The attributes of an accelerator that the checks read."""
    return SimpleNamespace(num_processes=count, device=SimpleNamespace(type=device))


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP version 1: .*choose version 2 in accelerate config"),
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
    assert asked_sharding(PLAIN) == Sharding()
    for name, value in {
        "RESHARD_AFTER_FORWARD": "false",
        "OFFLOAD_PARAMS": "true",
        "TRANSFORMER_CLS_TO_WRAP": "DoubleStreamBlock, SingleStreamBlock",
        "IGNORED_MODULES": "img_in",
    }.items():
        fsdp.setenv(f"FSDP_{name}", value)
    assert asked_sharding(PLAIN) == Sharding(False, True, ("DoubleStreamBlock", "SingleStreamBlock"), "img_in")
    fsdp.setenv("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT")
    with pytest.raises(UserError, match="LOCAL_STATE_DICT.*run accelerate config again"):
        asked_sharding(PLAIN)
    fsdp.setenv("ACCELERATE_USE_FSDP", "false")
    assert asked_sharding(PLAIN) is None


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8_base", True),
        ("fp8_base_unet", True),
        ("fp8_scaled", True),
        ("quantize_base", "int8"),
        ("torch_compile", True),
        ("memory_plan", "auto"),
    ],
)
def test_options_that_fsdp_excludes(fsdp: pytest.MonkeyPatch, name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--{name}: .*FSDP.*remove one of them"):
        check_launch(TrainingOptions(**{name: value}))


def test_one_process_shares_nothing_out(fsdp: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert sharding_for(PLAIN, processes(1), strict=False) is None
    assert "has no effect with one process" in caplog.text
    with pytest.raises(UserError, match="FSDP"):
        sharding_for(PLAIN, processes(1), strict=True)
    assert sharding_for(PLAIN, processes(2, "cpu"), strict=True) == Sharding()
    fsdp.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert sharding_for(PLAIN, processes(2), strict=True) == Sharding(on_host=True)
    with pytest.raises(UserError, match="fsdp_offload_params: .*set it to false"):
        sharding_for(PLAIN, processes(2, "cpu"), strict=False)


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


ADAMW = OptimizerChoice("AdamW", "torch.optim.AdamW", 1e-3, {})
OPTIONS = TrainNetworkOptions.from_args(Namespace())


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that accelerate launch makes for DeepSpeed, with the package seemingly there."""
    monkeypatch.setattr("library.training.zero.find_spec", lambda name: name)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return monkeypatch


@pytest.mark.parametrize("options", [TrainingOptions(deepspeed=True), TrainingOptions()])
def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, options: TrainingOptions) -> None:
    monkeypatch.setattr("library.training.zero.find_spec", lambda name: None)
    if not options.deepspeed:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="deepspeed is not installed; run: pip install deepspeed") as caught:
        make_accelerator(options)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_of_deepspeed_are_those_of_accelerate(deepspeed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_launch(TrainingOptions())
    assert asked_zero(TrainingOptions()) == Zero(2)
    deepspeed.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    deepspeed.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert asked_zero(TrainingOptions()) == Zero(1, on_host=True)
    agreeing = TrainingOptions(deepspeed=True, zero_stage=1, offload_optimizer_device="cpu")
    check_launch(agreeing)
    with pytest.raises(UserError, match="--deepspeed: .*different things"):
        check_launch(TrainingOptions(deepspeed=True))
    deepspeed.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert asked_zero(agreeing) == Zero(1, on_host=True) and asked_zero(TrainingOptions()) is None
    # a file of DeepSpeed's
    deepspeed.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    file = tmp_path / "zero.json"
    deepspeed.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    asked = {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": "auto", "stage3_max_live_parameters": 5}
    others = {"bf16": {"enabled": True}, "gradient_clipping": 0.5, "train_batch_size": 8}
    file.write_text(json.dumps({"zero_optimization": asked, **others}))
    check_launch(TrainingOptions())
    assert asked_zero(TrainingOptions()) == Zero(1, settings={"reduce_bucket_size": 1000})
    assert check_zero(OPTIONS, ADAMW, processes(2)) == [
        "accelerate's gradient_clipping 0.5 is not used, as --max_grad_norm 1 decides; give --max_grad_norm 0.5",
        "accelerate's train_batch_size 8 is not used, as the dataset's batch_size decides",
        "DeepSpeed's bf16 is not used, as --mixed_precision no decides",
    ]
    pinned = {"device": "cpu", "pin_memory": True}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": pinned}}))
    assert asked_zero(TrainingOptions()) == Zero(2, on_host=True, settings={"offload_optimizer": pinned})


@pytest.mark.parametrize("options", [TrainingOptions(deepspeed=True, zero_stage=3), PLAIN])
def test_stage_3_shards_weights_as_fsdp_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, options: TrainingOptions
) -> None:
    """Asked for by options or by accelerate's configuration; by options without the package."""
    monkeypatch.setattr("library.training.zero.find_spec", lambda name: None if options.deepspeed else name)
    if not options.deepspeed:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    check_launch(options)
    assert asked_zero(options) is None
    assert sharding_for(options, processes(2), strict=True) == Sharding(asked_as="ZeRO stage 3")
    assert sharding_for(options, processes(1), strict=False) is None
    assert "ZeRO stage 3 has no effect with one process" in caplog.text
    with pytest.raises(UserError, match="--memory_plan: not with ZeRO stage 3"):
        check_launch(replace(options, memory_plan="auto"))


def test_stage_3_in_a_file_of_deepspeeds(deepspeed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file, or its content in base64, as accelerate takes it; settings of stage 3 that torch does not need."""
    asked = {"stage": 3, "stage3_max_live_parameters": 5, "sub_group_size": 1000, "offload_param": {"device": "cpu"}}
    text = json.dumps({"zero_optimization": asked})
    (tmp_path / "zero.json").write_text(text)
    for given in (str(tmp_path / "zero.json"), base64.urlsafe_b64encode(text.encode()).decode()):
        deepspeed.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", given)
        check_launch(PLAIN)
        assert asked_sharding(PLAIN) == Sharding(on_host=True, asked_as="ZeRO stage 3") and asked_zero(PLAIN) is None


@pytest.mark.parametrize("name", ["offload_param_device", "offload_optimizer_device"])
def test_stage_3_on_the_host(monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture) -> None:
    options = TrainingOptions(deepspeed=True, zero_stage=3, **{name: "cpu"})
    on_host = Sharding(on_host=True, asked_as="ZeRO stage 3")
    assert sharding_for(options, processes(2), strict=True) == on_host
    assert sharding_for(options, processes(2, "cpu"), strict=False) == replace(on_host, on_host=False)
    assert "offloading has no effect on a CPU" in caplog.text
    monkeypatch.setattr("library.training.zero.find_spec", lambda package: package)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", "cpu")
    check_launch(options)
    assert asked_sharding(PLAIN) == on_host
    with pytest.raises(UserError, match="--deepspeed: .*different things"):
        check_launch(TrainingOptions(deepspeed=True, zero_stage=3))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to nvme: .*use cpu"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "to nvme: .*use cpu"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param: .*set it to none"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "with ZeRO stage 0.*to none"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "zero_optimization.round_robin_gradients"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "DeepSpeed's optimizer: .*remove it"),
        ({"train_batch_size": 4}, "accelerate's configuration of DeepSpeed: .*run accelerate config again"),
    ],
    ids=lambda value: "",
)
def test_settings_of_deepspeed_that_cannot_be(
    deepspeed: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, object], words: str
) -> None:
    (tmp_path / "zero.json").write_text(json.dumps(config))
    deepspeed.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    with pytest.raises(UserError, match=words) as caught:
        check_launch(TrainingOptions())
    assert len(str(caught.value).splitlines()) == 1


def test_what_deepspeed_says_before_anything_is_loaded(deepspeed: pytest.MonkeyPatch) -> None:
    assert check_zero(OPTIONS, ADAMW, processes(2)) == []
    (text,) = check_zero(OPTIONS, ADAMW, processes(1))
    assert isinstance(text, NoEffect) and "no effect with one process" in text
    deepspeed.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert check_zero(OPTIONS, ADAMW, processes(1)) == []
    (text,) = check_zero(OPTIONS, ADAMW, processes(2, "cpu"))
    assert isinstance(text, NoEffect) and "on a CPU" in text
    with pytest.raises(UserError, match="--optimizer_type Adafactor: DeepSpeed gives it pieces"):
        check_zero(OPTIONS, OptimizerChoice("Adafactor", "torch.optim.Adafactor", 1e-3, {}), processes(2))


def test_deepspeed_and_fsdp(deepspeed: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--deepspeed: not with FSDP.*remove one of them"):
        deepspeed.delenv("ACCELERATE_USE_DEEPSPEED")
        deepspeed.setenv("ACCELERATE_USE_FSDP", "true")
        deepspeed.setenv("FSDP_VERSION", "2")
        check_launch(TrainingOptions(deepspeed=True))
