"""Optimizers tried out on small tensors: what cannot train or resume is found; the matrix of all that are installed."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from library.errors import UserError
from library.optim.optimizers import OptimizerChoice, recorded_choice, resolve_optimizer
from library.optim.trial import changed_values, check_by_trial, check_change, is_schedule_free, keeps_memory_format

CPU = torch.device("cpu")


def choice_of(name: str, *arguments: str, rate: float = 1e-3) -> OptimizerChoice:
    return resolve_optimizer(name, False, False, arguments, rate)


def test_a_usual_one_passes_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert check_by_trial(choice_of("AdamW"), CPU, keeps_states=True) == []
    assert check_by_trial(choice_of("AdamW", rate=0.0), CPU, keeps_states=True) == []
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SophiaH", "it cannot be used for training here: a step on a small tensor fails with element 0"),
        ("AliG", "it cannot be used for training here: a step on a small tensor fails with AliG requires closure"),
    ],
)
def test_what_cannot_train_is_named(name: str, words: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(UserError, match=f"--optimizer_type pytorch_optimizer.{name}: {words}") as found:
        check_by_trial(choice_of(f"pytorch_optimizer.{name}"), CPU, keeps_states=False)
    assert len(str(found.value).splitlines()) == 1


class Still(torch.optim.SGD):
    """Changes nothing."""

    def step(self, closure: None = None) -> None:
        pass


class Forgetful(torch.optim.SGD):
    """Has what decides its steps outside of its state."""

    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, lr)
        self.steps = 0

    def step(self, closure: None = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * self.steps * parameter.grad


def test_one_that_changes_nothing_and_one_that_forgets() -> None:
    with pytest.raises(UserError, match="steps on a small tensor change nothing"):
        check_by_trial(choice_of(f"{__name__}.Still"), CPU, keeps_states=False)
    (warning,) = check_by_trial(choice_of(f"{__name__}.Forgetful"), CPU, keeps_states=True)
    assert "a resumed run continues, but not exactly" in warning


def test_states_that_cannot_be_restored() -> None:
    pytest.importorskip("pytorch_optimizer")
    choice = choice_of("pytorch_optimizer.Conda")
    (warning,) = check_by_trial(choice, CPU, keeps_states=False)
    assert "a state of it cannot be restored (it holds more than tensors and plain values)" in warning
    with pytest.raises(UserError, match="save and resume no states"):
        check_by_trial(choice, CPU, keeps_states=True)


@pytest.mark.parametrize(
    ("name", "package", "expected"),
    [
        ("AdamWScheduleFree", "schedulefree", True),
        ("RAdamScheduleFree", "schedulefree", True),
        ("pytorch_optimizer.ScheduleFreeAdamW", "pytorch_optimizer", True),
        ("pytorch_optimizer.ScheduleFreeSGD", "pytorch_optimizer", True),
        ("pytorch_optimizer.ScheduleFreeRAdam", "pytorch_optimizer", True),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigyplus", True),
        ("AdamW", "torch", False),
    ],
)
def test_schedule_free_optimizers_are_asked(name: str, package: str, expected: bool) -> None:
    pytest.importorskip(package)
    assert is_schedule_free(choice_of(name, rate=1.0)) is expected


def test_which_optimizers_keep_memory_formats() -> None:
    assert keeps_memory_format(choice_of("AdamW"), CPU)
    assert keeps_memory_format(choice_of("Muon"), CPU), "matrices have one format alone"
    pytest.importorskip("bitsandbytes")
    assert not keeps_memory_format(choice_of("AdamW8bit"), CPU)


def test_prodigy_plus_may_go_without() -> None:
    pytest.importorskip("prodigyplus")
    assert not is_schedule_free(choice_of("prodigyplus.ProdigyPlusScheduleFree", "use_schedulefree=False", rate=1.0))


def test_arguments_that_change_on_resume() -> None:
    now = choice_of("AdamW", "weight_decay=0.2", "betas=(0.8,0.99)")
    before = recorded_choice("torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.999))", now)
    assert changed_values(before, now) == {"weight_decay": 0.2, "betas": (0.8, 0.99)}
    check_change(before, now, CPU)
    assert recorded_choice("torch.optim.adamw.AdamW(a=b c)", now) is None
    # a state without the largest squares cannot be gone on with by one that needs them
    with pytest.raises(UserError, match=r"--resume: the state was saved with .*AdamW\(amsgrad=False\), which"):
        check_change(choice_of("AdamW", "amsgrad=False"), choice_of("AdamW", "amsgrad=True"), CPU)


# ---- the matrix ----

#: packages and modules whose optimizers are tried, all of them
_MODULES = ("torch.optim", "bitsandbytes.optim", "dadaptation", "schedulefree", "prodigyopt", "prodigyplus",
            "lion_pytorch", "pytorch_optimizer")  # fmt: skip
#: whose state says too little
_NOT_EXACT: tuple[str, ...] = ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", _MODULES)
def test_every_optimizer_resumes_exactly_or_is_named(module: str) -> None:
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip("not installed")
    classes = [
        name
        for name, kind in sorted(vars(importlib.import_module(module)).items())
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    ]
    exact, named = [], {}
    for name in classes:
        try:
            rate = 1.0 if "rodigy" in name or name.startswith("DAdapt") else 1e-3
            found = check_by_trial(choice_of(f"{module}.{name}", rate=rate), CPU, keeps_states=False)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            named[name] = str(error)
            continue
        if found:
            named[name] = found[0]
        else:
            exact.append(name)
    assert not [name for name, text in named.items() if "not exactly" in text and name not in _NOT_EXACT], named
    assert len(exact) >= 0.5 * len(classes), named
