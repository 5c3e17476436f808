"""What accelerate's configuration asks for is had, or refused by name."""

from __future__ import annotations

import logging

import pytest

from library.config.arguments import TrainingOptions
from library.errors import UserError
from library.training.launch import UNSUPPORTED, check_launch
from library.training.processes import make_accelerator


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*UNSUPPORTED, "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
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
