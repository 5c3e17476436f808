"""The moving average of the trained weights: its formula, its place in states, its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from library.errors import UserError
from library.optim.ema import STATE_FILE, WeightAverage
from library.optim.shards import LocalShards
from library.training.checkpoints import ema_path, remove_outdated


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    return {
        "a": torch.nn.Parameter(torch.ones(2, dtype=dtype)),
        "b": torch.nn.Parameter(torch.zeros(3, 1, dtype=dtype)),
    }


def set_all(given: dict[str, torch.nn.Parameter], value: float) -> None:
    with torch.no_grad():
        for parameter in given.values():
            parameter.fill_(value)


def test_the_formula_by_hand() -> None:
    given = parameters()
    average = WeightAverage(given, 0.25)
    set_all(given, 3.0)
    average.update(1)  # min(0.25, 2/11) = 2/11: a = 2/11 * 1 + 9/11 * 3
    assert average.state_dict()["a"].tolist() == pytest.approx([29 / 11] * 2)
    set_all(given, 0.0)
    average.update(2)  # min(0.25, 3/12) = 1/4
    assert average.state_dict()["a"].tolist() == pytest.approx([29 / 44] * 2)
    assert average.decay_at(1000) == 0.25
    # 0.99 is reached where (1 + t) / (10 + t) = 0.99, at step 890
    slow = WeightAverage(given, 0.99)
    assert slow.decay_at(889) < slow.decay_at(890) == slow.decay_at(100_000) == 0.99


def test_half_precision_is_averaged_in_float32() -> None:
    given = parameters(torch.bfloat16)
    average = WeightAverage(given, 0.999)
    set_all(given, 1.0 + 2**-7)
    for step in range(10_000, 10_003):  # each moves 1 by 2^-7 / 1000, far below what bfloat16 holds
        average.update(step)
    assert average.state_dict()["a"].dtype == torch.float32
    assert 1.0 < float(average.state_dict()["a"][0]) < 1.0 + 2**-7


def test_applied_puts_everything_back() -> None:
    given = parameters()
    average = WeightAverage(given, 0.9)
    values = {name: torch.randn_like(p) for name, p in given.items()}
    with torch.no_grad():
        for name, parameter in given.items():
            parameter.copy_(values[name])
    with pytest.raises(RuntimeError, match="disk"), average.applied():
        assert given["a"].tolist() == [1.0, 1.0]
        raise RuntimeError("disk full")
    assert all(torch.equal(given[name], values[name]) for name in given)


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_states_hold_the_averages(tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture) -> None:
    given = parameters()
    average = WeightAverage(given, 0.9)
    average.keep_with_states(accelerator, LocalShards(given.values(), accelerator.device))
    set_all(given, 5.0)
    average.update(1)
    accelerator.save_state(str(tmp_path / "state"))
    kept = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    average.update(2)
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in average.state_dict().items())

    (tmp_path / "state" / STATE_FILE).unlink()
    accelerator.load_state(str(tmp_path / "state"))
    assert "holds no averages" in caplog.text
    set_all(given, 7.0)
    average.update(3)
    assert average.state_dict()["a"].tolist() == [7.0, 7.0], "it starts with the weights of the state"


def test_averages_of_another_network_are_refused() -> None:
    average = WeightAverage(parameters(), 0.9)
    with pytest.raises(UserError, match="of other parameters"):
        average.load_state_dict({"a": torch.ones(2)})


def test_names_and_retention(tmp_path: Path) -> None:
    weights = tmp_path / "x-000002.safetensors"
    assert ema_path(weights).name == "x-000002-ema.safetensors"
    for path in (weights, ema_path(weights), tmp_path / "x-ema.safetensors"):
        path.write_text("x")
    remove_outdated(weights)
    assert [path.name for path in tmp_path.iterdir()] == ["x-ema.safetensors"]
