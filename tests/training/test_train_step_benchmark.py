"""``benchmarks/train_step.py`` measures each family's script, and the plain loop that it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.train_step import SCRIPTS, Case, make_model, run_case, run_reference

CASE = Case("tiny", "bf16", resolution=64, batch_size=2, steps=4, rank=2)
EVERYTHING = {"checkpointing": True, "cache_text": True, "adamw8bit": True}


@pytest.mark.slow
@pytest.mark.parametrize("arch", SCRIPTS["adapter"])
@pytest.mark.parametrize(
    "options", [{"uncached": True}, EVERYTHING, {"kind": "full"}], ids=["uncached", "everything", "full"]
)
def test_a_run_and_the_plain_loop(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    if "adamw8bit" in options:
        pytest.importorskip("bitsandbytes")
    case = Case(**{**vars(CASE), "arch": arch, **options})
    model = make_model(tmp_path, arch, case.size)
    for metrics in (run_case(case, model, tmp_path), run_reference(case, model, tmp_path)):
        assert 0 < metrics.seconds_per_step < metrics.total_seconds
        assert metrics.samples_per_second == pytest.approx(2 / metrics.seconds_per_step, rel=0.05)
        assert metrics.seconds_before_first_step < metrics.total_seconds
        assert 0.2 < metrics.peak_host_gb < 5
        assert metrics.peak_device_gb is None or metrics.peak_device_gb > 0


def test_switches_hold_for_both() -> None:
    case = Case(**{**vars(CASE), **EVERYTHING, "compile": True})
    assert case.switches() == [
        "--gradient_checkpointing", "--cache_text_encoder_outputs", "--cache_latents", "--torch_compile",
        "--optimizer_type", "AdamW8bit",
    ]  # fmt: skip
    assert case.reference_switches() == ["--checkpointing", "--cache_text", "--adamw8bit", "--compile"]
    assert CASE.switches() == ["--cache_latents"] and CASE.reference_switches() == []


@pytest.mark.parametrize("arch", SCRIPTS["adapter"])
def test_the_plain_loop_trains_the_same_modules(tmp_path: Path, arch: str) -> None:
    pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    from benchmarks.diffusers_lora import ATTENTION
    from networks.lora import create_network

    model = make_model(tmp_path, arch, "tiny")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    network = create_network(1.0, CASE.rank, 1.0, None, None, unet)
    ours = sorted(tuple(p.shape) for adapter in network.unet_loras for p in adapter.parameters())
    unet.add_adapter(LoraConfig(r=CASE.rank, target_modules=ATTENTION))
    assert sorted(tuple(p.shape) for p in unet.parameters() if p.requires_grad) == ours
