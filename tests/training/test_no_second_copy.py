"""Training of whole models: averages, states and exchanges without a second copy of the weights on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from library.files.streamed import tensor_info, write_streamed
from library.optim import gradient_exchange
from library.optim.ema import WeightAverage
from library.optim.gradient_exchange import buckets_of
from library.optim.optimizers import resolve_optimizer
from library.optim.schedulers import ScheduleSettings
from library.optim.update import Update, UpdateSettings
from library.training.nonfinite import StepGuard
from library.training.state_weights import stream_weights


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_on_the_host_are_those_on_the_device(dtype: torch.dtype) -> None:
    parameters = dict(model(dtype).named_parameters())
    device, host = (WeightAverage(parameters, 0.9, on_host=on_host) for on_host in (False, True))
    for step in range(1, 6):
        with torch.no_grad():
            for number, parameter in enumerate(parameters.values()):
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + number))
        device.update(step)
        host.update(step)
        if step == 3:  # a look in the middle changes nothing
            assert all(torch.equal(device.state_dict()[n], host.state_dict()[n]) for n in parameters)
    other = WeightAverage(parameters, 0.9, on_host=True)
    other.load_state_dict(host.state_dict())
    for name in parameters:
        assert torch.equal(device.state_dict()[name], host.state_dict()[name])
        assert torch.equal(host.state_dict()[name], other.state_dict()[name])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with host.applied():
        assert all(torch.equal(p, host.state_dict()[name].to(dtype)) for name, p in parameters.items())
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_gradients_are_exchanged_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_exchange, "MOST_AT_ONCE", 10)
    sizes = [(4, torch.float32), (7, torch.float32), (3, torch.bfloat16), (3, torch.float32), (20, torch.float32),
             (5, torch.bfloat16)]  # fmt: skip
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    buckets = buckets_of(tensors)
    assert [[t.numel() for t in bucket] for bucket in buckets] == [[4], [7, 3], [3, 5], [20]]
    assert all(len({t.dtype for t in bucket}) == 1 for bucket in buckets)


def test_states_are_streamed_into_the_same_files(tmp_path: Path, accelerator: Accelerator) -> None:
    first, second = (accelerator.prepare_model(model(), evaluation_mode=True) for _ in range(2))
    accelerator.save_state(str(tmp_path / "accelerate"))
    stream_weights(accelerator)
    accelerator.save_state(str(tmp_path / "streamed"))
    for name in ("model.safetensors", "model_1.safetensors"):
        ours, theirs = tmp_path / "streamed" / name, tmp_path / "accelerate" / name
        one, other = load_file(ours), load_file(theirs)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        with safe_open(ours, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    expected = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    for tensor in (*first.state_dict().values(), *second.state_dict().values()):
        tensor.zero_()
    accelerator.load_state(str(tmp_path / "accelerate"))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in first.state_dict().items())
    assert all(torch.equal(tensor, expected[key]) for key, tensor in second.state_dict().items())
    second[2].weight = nn.Parameter(torch.zeros(2, 9))
    with pytest.raises(RuntimeError, match="size mismatch for 2.weight"):
        accelerator.load_state(str(tmp_path / "streamed"))


def test_every_process_produces_and_one_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.ones(1)}
    infos = {name: tensor_info(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    orders = []
    for writes in (True, False):
        produced: list[str] = []

        def produce(name: str, produced: list[str] = produced) -> Tensor:
            produced.append(name)
            return tensors[name]

        write_streamed(tmp_path / f"{writes}.safetensors", infos, produce, writes=writes)
        orders.append(produced)
    assert orders[0] == orders[1] and sorted(orders[0]) == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["True.safetensors"]


def test_the_guard_of_whole_models_keeps_no_weights(accelerator: Accelerator) -> None:
    network = model()
    update = Update(
        accelerator,
        resolve_optimizer("AdamW", False, False, None, 1e-3),
        [{"params": list(network.parameters())}],
        ScheduleSettings(),
        UpdateSettings(seed=1, total_steps=4),
    )
    for keeps_copies in (True, False):
        guard = StepGuard(update, accelerator, "stop", keeps_copies=keeps_copies)
        guard.start(1)
        assert bool(guard._pending[-1].before) is keeps_copies
        assert guard.check(1) is None
    for loss, well in ((1.0, True), (float("nan"), False)):
        guard = StepGuard(update, accelerator, "skip", keeps_copies=False)
        guard.start(1)
        assert not guard._pending[-1].before
        guard.saw_step(torch.tensor(loss))
        assert guard.before_update(torch.tensor(1.0)) is well
