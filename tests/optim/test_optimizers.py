"""Optimizers by name: classes, arguments, mistakes, exact resume."""

from __future__ import annotations

import copy

import pytest
import torch

from library.errors import UserError
from library.optim.optimizers import resolve_optimizer
from library.optim.param_groups import lr_log_entries


def resolve(name: str = "", *args: str, lr: float = 1e-3, **more: object):
    return resolve_optimizer(name, False, False, list(args), lr, **more)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "torch.optim.adamw.AdamW"),
        ("adamw", "torch.optim.adamw.AdamW"),
        ("AdamW8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
        ("Lion", "lion_pytorch.lion_pytorch.Lion"),
        ("SGDNesterov", "torch.optim.sgd.SGD(nesterov=True,momentum=0.9)"),
        ("Adafactor", "transformers.optimization.Adafactor(relative_step=True)"),
        ("Prodigy", "prodigyopt.prodigy.Prodigy"),
        ("RMSprop", "torch.optim.rmsprop.RMSprop"),
        ("torch.optim.Adagrad", "torch.optim.adagrad.Adagrad"),
        ("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
    ],
)
def test_names(name: str, text: str) -> None:
    if name == "Prodigy":
        pytest.importorskip("prodigyopt")
    assert resolve(name, lr=1.0).metadata_name == text


def test_arguments_are_python_literals() -> None:
    choice = resolve("AdamW", "weight_decay=0.01", "betas=.9,.99")
    optimizer = choice.create([{"params": [torch.nn.Parameter(torch.ones(1))]}])
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["betas"]) == (0.01, (0.9, 0.99))
    assert choice.metadata_name == "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))"


def test_old_flags() -> None:
    assert resolve_optimizer("", True, False, None, 1e-4).name == "AdamW8bit"
    assert resolve_optimizer("", False, True, None, 1e-4).name == "Lion"
    with pytest.raises(UserError, match="exclude each other"):
        resolve_optimizer("AdamW", True, False, None, 1e-4)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("AdamWW", [], 'did you mean "AdamW"'),
        ("torch.optim.AdmW", [], 'did you mean "AdamW"'),
        ("nopackage.Optimizer", [], "nopackage is not installed"),
        ("AdamW", ["weight_decy=1"], 'did you mean "weight_decay"'),
        ("AdamW", ["weight_decay"], "key=value"),
        ("AdamW", ["a=b=c"], "key=value"),
        ("AdamW", ["weight_decay=high"], "no Python literal"),
        ("AdamWScheduleFree", [], "pip install schedulefree"),
        ("DAdaptAdam", [], "pip install dadaptation"),
    ],
)
def test_mistakes(name: str, args: list[str], words: str) -> None:
    import importlib.util

    if "pip install" in words and importlib.util.find_spec(words.rsplit(" ", 1)[1]):
        pytest.skip("the package is there")
    with pytest.raises(UserError) as found:
        resolve(name, *args)
    assert words in str(found.value)
    assert len(str(found.value).splitlines()) == 1


def test_a_bad_value_is_reported_at_creation() -> None:
    with pytest.raises(UserError, match="AdamW"):
        resolve("AdamW", "betas=(2.0,0.9)").create([{"params": [torch.nn.Parameter(torch.ones(1))]}])


def test_adafactor_relative_step() -> None:
    choice = resolve("Adafactor", separate_rates=True)
    assert choice.uses_relative_step and any("--unet_lr" in warning for warning in choice.warnings)
    optimizer = choice.create([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}])
    assert optimizer.param_groups[0]["lr"] is None
    own = resolve("Adafactor", "relative_step=False")
    assert not own.uses_relative_step and not own.warnings
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5}]
    assert own.create(groups).param_groups[0]["lr"] == 0.5
    forced = resolve("Adafactor", "relative_step=False", "warmup_init=True")
    assert forced.uses_relative_step and forced.warnings


def test_adaptive_optimizers_warn_of_a_low_rate() -> None:
    pytest.importorskip("prodigyopt")
    assert resolve("Prodigy", lr=1e-4).warnings and not resolve("Prodigy", lr=1.0).warnings


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Adafactor", "Lion", "SGDNesterov"])
def test_a_restored_optimizer_goes_on_exactly(name: str) -> None:
    torch.manual_seed(0)
    # 8-bit states are used from 4096 values on
    weights = torch.nn.Parameter(torch.randn(80, 80))
    choice = resolve(name)
    optimizer = choice.create([{"params": [weights]}])

    def step(parameter: torch.nn.Parameter, with_optimizer: object, seed: int) -> None:
        parameter.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(seed))
        with_optimizer.step()

    for seed in range(3):
        step(weights, optimizer, seed)
    state, again = copy.deepcopy(optimizer.state_dict()), torch.nn.Parameter(weights.detach().clone())
    restored = choice.create([{"params": [again]}])
    restored.load_state_dict(state)
    for seed in range(3, 6):
        step(weights, optimizer, seed)
        step(again, restored, seed)
    assert torch.equal(weights, again)


def test_log_entries() -> None:
    choice = resolve("AdamW")
    one, two = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = choice.create([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.2}])
    entries = lr_log_entries(optimizer, choice, ["textencoder", "unet"])
    assert entries == {"lr/textencoder": 0.1, "lr/group0": 0.1, "lr/unet": 0.2, "lr/group1": 0.2}


def test_log_entries_of_a_found_rate() -> None:
    pytest.importorskip("prodigyopt")
    choice = resolve("Prodigy", lr=1.0)
    optimizer = choice.create([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}])
    entries = lr_log_entries(optimizer, choice, ["unet"])
    assert set(entries) == {"lr/unet", "lr/group0", "lr/d*lr/unet", "lr/d*lr/group0"}
    assert entries["lr/d*lr/unet"] == pytest.approx(1e-6)
