"""The parts of a model that are on the device, while and after they are used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.memory.placing import STAYS, on_device
from library.memory.plan import Home, MemoryPlan, PlannedStorage

FP32 = torch.float32


def plan_of(device: torch.device, vae_home: Home = "host") -> MemoryPlan:
    return MemoryPlan.of(
        device, frozen=FP32, encoders=["text_encoder_1", "text_encoder_2"], denoiser="denoiser", vae="vae",
        trained={"text_encoder_2": torch.bfloat16}, storage=PlannedStorage(), vae_dtype=FP32, vae_home=vae_home,
    )  # fmt: skip


class Part(nn.Module):
    """A module that says where it is; nothing is moved."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.place, self.moves = place, 0

    def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
        yield type("Weight", (), {"device": torch.device(self.place)})()

    def to(self, device: torch.device | str) -> Part:  # type: ignore[override]
        self.place, self.moves = str(device), self.moves + 1
        return self


def test_only_the_parts_of_a_stage_leave_their_homes() -> None:
    plan = plan_of(torch.device("cuda"))
    models = {"text_encoder_1": Part("cuda"), "denoiser": Part("cuda"), "vae": Part("cpu"), "text_encoder_2": None}

    def places() -> dict[str, str]:
        return {name: part.place for name, part in models.items() if part is not None}

    with plan.stage(models, "vae", "text_encoder_2"):
        assert places() == {"text_encoder_1": "cuda", "denoiser": "cuda", "vae": "cuda"}
    assert places() == {"text_encoder_1": "cuda", "denoiser": "cuda", "vae": "cpu"}
    models["vae"] = Part("cuda")  # as caching leaves it
    with plan.stage(models, "denoiser"):
        assert places()["vae"] == "cpu"
    assert places()["vae"] == "cpu" and models["denoiser"].moves == 0


def test_an_error_within_a_stage_sends_parts_home() -> None:
    vae = Part("cpu")
    with pytest.raises(RuntimeError), plan_of(torch.device("cuda")).stage({"vae": vae}, "vae"):
        raise RuntimeError
    assert (vae.place, vae.moves) == ("cpu", 2)


def test_parts_that_stay_are_not_moved() -> None:
    encoder = Part("cpu")
    setattr(encoder, STAYS, True)
    with on_device(encoder, torch.device("cuda")):
        assert encoder.place == "cpu"


@pytest.mark.parametrize(("home", "place"), [("host", "cpu"), ("device", "cuda")])
def test_parts_rest_at_home(home: Home, place: str) -> None:
    vae = Part("cuda")
    plan_of(torch.device("cuda"), home).rest("vae", vae)
    assert vae.place == place


def test_each_part_has_its_own_dtype() -> None:
    plan = plan_of(torch.device("cpu"))
    assert [plan[name].dtype for name in ("text_encoder_1", "text_encoder_2")] == [FP32, torch.bfloat16]
    assert dict(plan.rows())["memory, text encoder 2"] == "bfloat16, trained, on the device"
