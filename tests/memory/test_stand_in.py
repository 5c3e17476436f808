"""Steps of every family on the stand-in accelerator: no wait for the device, no mix of devices, no more memory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from library.memory.stand_in import Measured, measure
from tests.fixtures.runs import Finished, run_script

#: what steps took when they were last recorded: python tests/fixtures/traced_steps.py NAME [--short]
RECORDED = json.loads((Path(__file__).parent / "recorded_steps.json").read_text(encoding="utf-8"))
#: more is a fault; less is an improvement that must be recorded, or the next fault hides behind it
TOLERANCE = 0.05
CASES = [pytest.param(name, marks=() if name.endswith("--short") else pytest.mark.slow) for name in RECORDED]


#: the same where whole models are trained: python tests/fixtures/traced_full.py NAME [--short]
RECORDED_FULL = json.loads((Path(__file__).parent / "recorded_full_steps.json").read_text(encoding="utf-8"))
FULL = [
    pytest.param(name, marks=() if name == "sd35 --short" else pytest.mark.slow, id=f"full {name}")
    for name in RECORDED_FULL
]


@pytest.mark.parametrize("case", FULL)
def test_a_step_of_a_whole_model_takes_what_was_recorded(case: str) -> None:
    compare(run_script("tests/fixtures/traced_full.py", *case.split()), RECORDED_FULL[case])


#: the same for what is trained beside a frozen model: python tests/fixtures/traced_kinds.py "NAME KIND [--short]" ...
RECORDED_KINDS = json.loads((Path(__file__).parent / "recorded_kind_steps.json").read_text(encoding="utf-8"))


def is_quick(case: str) -> bool:
    return case.startswith("sd ") and case.endswith("--short")


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["short", "all others"])
def test_steps_of_second_models_and_words_take_what_was_recorded(quick: bool) -> None:
    cases = [case for case in RECORDED_KINDS if is_quick(case) == quick]
    done = run_script("tests/fixtures/traced_kinds.py", *cases)
    assert done.code == 0, done.text
    found = json.loads(done.out)
    for case in cases:
        agrees(found[case], RECORDED_KINDS[case], case)


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_was_recorded(case: str) -> None:
    compare(run_script("tests/fixtures/traced_steps.py", *case.split()), RECORDED[case])


def compare(done: Finished, recorded: dict[str, int]) -> None:
    assert done.code == 0, done.text
    agrees(json.loads(done.out), recorded)


def agrees(found: dict[str, int], recorded: dict[str, int], case: str = "") -> None:
    assert found.keys() == recorded.keys()
    for name, value in found.items():
        assert value == pytest.approx(recorded[name], rel=TOLERANCE), f"{case} {name}: {found}, not {recorded}"


def test_a_step_that_waits_or_mixes_devices_fails() -> None:
    """In a process of its own, as the device changes torch for good."""
    done = run_script("tests/fixtures/faulty_steps.py")
    assert done.code == 0, done.text
    assert done.out.split() == ["DataDependentOutputException", "FakeTensorDeviceMismatchError", "fine"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_is_really_allocated(checkpointing: bool) -> None:
    """The trace counts storages; torch's profiler reports each allocation and release of the allocator."""
    model = nn.Sequential(*(Block(128) for _ in range(4)))
    x = torch.randn(512, 128)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step() -> None:
        y = x
        for block in model:
            y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False) if checkpointing else block(y)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    resident = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values()), x]
    before = sum(tensor.nbytes for tensor in resident)
    really = before + allocated_at_most(step)
    found = measure(step, resident, device_type="cpu")
    assert found.resident == before
    assert found.peak == pytest.approx(really, rel=0.05), asdict(found)
    assert isinstance(found, Measured) and found.kernels > 50


def allocated_at_most(step) -> int:
    """Bytes that are allocated on the CPU at the worst moment, beyond those at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
