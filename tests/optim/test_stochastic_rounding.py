"""Half-precision training: unbiased rounding, tiny updates that add up, exact resume, with several optimizers."""

from __future__ import annotations

import copy

import pytest
import torch

from library.optim import stochastic_rounding
from library.optim.states import keep_state_dtypes
from library.optim.stochastic_rounding import HalfGradScaler, round_stochastically, train_in_half

HALVES = [torch.bfloat16, torch.float16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.0009, -1.0009, 3e-8, -3e-8, 0.49999, -65000.3, 1e-5])
def test_the_mean_is_kept_and_results_are_the_two_neighbours(dtype: torch.dtype, value: float) -> None:
    exact = torch.full((100_000,), value)
    rounded = round_stochastically(exact, dtype, generator()).double()
    found = rounded.unique()
    assert len(found) <= 2
    assert found.min() <= exact[0] <= found.max()
    spacing = float(found.max() - found.min())
    # five standard errors of a mean of 100 000 draws between two values
    assert abs(float(rounded.mean()) - float(exact[0])) <= 5 * 0.5 * spacing / 100_000**0.5 + 1e-12
    if len(found) == 2:  # neighbours: nothing lies between them
        middle = ((found[0] + found[1]) / 2).to(dtype)
        assert float(middle) in found.tolist()


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_of_the_format_stay(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[~values.isnan()]
    assert torch.equal(round_stochastically(values.float(), dtype, generator()), values)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e39, 0.0, -0.0])
    rounded = round_stochastically(odd, dtype, generator()).float()
    every_bit = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # the NaN that GPUs make
    assert round_stochastically(every_bit, dtype, generator()).isnan().all()
    assert rounded[0].isnan() and rounded[1:4].isinf().all() and not rounded[4:].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_memory_formats_stay_and_make_no_difference(dtype: torch.dtype) -> None:
    """A resumed run begins with the formats that models are loaded in."""
    plain = torch.randn(4, 3, 3, 3, generator=generator(1))
    last = plain.to(memory_format=torch.channels_last)
    one, other = (round_stochastically(values, dtype, generator(2)) for values in (plain, last))
    assert torch.equal(one, other)
    assert one.stride() == plain.stride() and other.stride() == last.stride() != plain.stride()


def weight(dtype: torch.dtype, size: int = 4096, value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((size,), value, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_tiny_updates_add_up_where_plain_rounding_loses_them(dtype: torch.dtype) -> None:
    plain, rounded = weight(dtype), weight(dtype)
    first = torch.optim.SGD([plain], lr=1e-4)
    second = torch.optim.SGD([rounded], lr=1e-4)
    train_in_half(second, seed=1, alone=True)
    for _ in range(50):
        for parameter, optimizer in ((plain, first), (rounded, second)):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert rounded.dtype == dtype
    assert torch.equal(plain, torch.ones_like(plain))  # half of a spacing was never reached
    assert float(rounded.detach().double().mean()) == pytest.approx(1 - 50e-4, abs=3e-4)


def make(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 3e-3}]
    if name == "Adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=1e-3, relative_step=False, scale_parameter=False)
    if name == "AdamWScheduleFree":
        return pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr=1e-3)
    if name == "Prodigy":
        return pytest.importorskip("prodigyopt").Prodigy([{"params": parameters}], lr=1.0)
    return getattr(torch.optim, name)(groups, lr=1e-3)


def train(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in steps:
        for index, parameter in enumerate(parameters):
            draws = torch.randn(parameter.shape, generator=generator(100 * step + index))
            parameter.grad = draws.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adafactor", "AdamWScheduleFree", "Prodigy"])
def test_resume_is_exact_and_state_is_half(name: str) -> None:
    def begin() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [
            torch.nn.Parameter(torch.randn(24, 16, generator=generator(n)).to(torch.bfloat16)) for n in range(3)
        ]
        optimizer = make(name, parameters)
        keep_state_dtypes(optimizer)
        train_in_half(optimizer, seed=7, alone=name not in ("Prodigy",))
        return parameters, optimizer

    whole, optimizer = begin()
    train(whole, optimizer, range(3))
    kept = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in whole]
    train(whole, optimizer, range(3, 6))
    for parameter in whole:
        assert parameter.dtype == torch.bfloat16
        shaped = [v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape]
        assert all(value.dtype == torch.bfloat16 for value in shaped)

    rest, resumed = begin()
    for parameter, value in zip(rest, weights, strict=True):
        parameter.data.copy_(value)
    resumed.load_state_dict(kept)
    train(rest, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def test_on_average_it_moves_as_the_float32_optimizer() -> None:
    starts = torch.randn(128, 128, generator=generator(5)).to(torch.bfloat16)
    moved = []
    for dtype, wrapped in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        parameter = torch.nn.Parameter(starts.to(dtype, copy=True))
        optimizer = torch.optim.AdamW([parameter], lr=2e-4, weight_decay=0.0)
        if wrapped:
            train_in_half(optimizer, seed=1, alone=True)
        for step in range(60):
            noise = torch.randn(parameter.shape, generator=generator(step))
            parameter.grad = (0.5 + noise).to(dtype)
            optimizer.step()
        moved.append(float((parameter.detach().float() - starts.float()).mean()))
    full, rounded, plain = moved
    assert rounded == pytest.approx(full, rel=0.05)
    assert abs(plain - full) > 0.2 * abs(full)  # what rounding to nearest would have done


def test_a_scheduler_and_fp16_loss_scaling_go_with_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    train_in_half(optimizer, seed=1, alone=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = HalfGradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale((parameter * factor).sum()).backward()
        scaler.unscale_(optimizer)
        if factor == 1.0:
            assert torch.equal(parameter.grad, torch.ones_like(parameter))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
    # two updates, at rates of 0.5 and 0.125; the infinite one was left out
    assert torch.equal(parameter.detach(), torch.full_like(parameter, 0.375))


def test_float32_parameters_are_stepped_as_usual() -> None:
    a, b = weight(torch.float32, 16), weight(torch.float32, 16)
    first, second = torch.optim.AdamW([a], lr=1e-2), torch.optim.AdamW([b], lr=1e-2)
    train_in_half(second, seed=3, alone=True)
    train([a], first, range(3))
    train([b], second, range(3))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "AdamWScheduleFree"])
def test_a_step_in_pieces_rounds_as_a_step_over_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for most in (2**26, 200):  # of 24 x 16 numbers each: all at once, and one by one
        monkeypatch.setattr(stochastic_rounding, "_MOST_AT_ONCE", most)
        parameters = [
            torch.nn.Parameter(torch.randn(24, 16, generator=generator(n)).to(torch.bfloat16)) for n in range(3)
        ]
        parameters.append(weight(torch.float32, 5))
        optimizer = make(name, parameters)
        train_in_half(optimizer, seed=7, alone=True)
        train(parameters, optimizer, range(3))
        results.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
