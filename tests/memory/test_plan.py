"""How each part of a model is kept, and where it is after its use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.memory.plan import Home, MemoryPlan, PlannedStorage

FP32 = torch.float32


def plan_of(device: torch.device, vae_home: Home = "host") -> MemoryPlan:
    return MemoryPlan.of(
        device, frozen=FP32, encoders=["text_encoder_1", "text_encoder_2"], denoiser="denoiser", vae="vae",
        trained={"text_encoder_2": torch.bfloat16}, storage=PlannedStorage(), vae_dtype=FP32, vae_home=vae_home,
    )  # fmt: skip


@pytest.mark.parametrize(("home", "place"), [("host", "cpu"), ("device", "meta")])
def test_parts_rest_at_home(home: Home, place: str) -> None:
    vae = nn.Linear(2, 2, device="meta")
    vae.to = lambda **given: vae.to_empty(device=given["device"])  # type: ignore[method-assign]  # meta has no numbers
    plan_of(torch.device("meta"), home).rest("vae", vae)
    assert vae.weight.device.type == place


def test_each_part_has_its_own_dtype() -> None:
    plan = plan_of(torch.device("cpu"))
    assert [plan[name].dtype for name in ("text_encoder_1", "text_encoder_2")] == [FP32, torch.bfloat16]
    assert dict(plan.rows())["memory, text encoder 2"] == "bfloat16, trained, on the device"
