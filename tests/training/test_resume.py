"""States that cannot be resumed: an error before anything is loaded, and nothing in them is executed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from library.config.arguments import ValidationOptions
from library.errors import UserError
from library.optim.optimizers import resolve_optimizer
from library.training.kinds.adapter import Adapter
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.resume import TrainState, check_fits, load_state
from library.training.settings import run_plan
from library.training.validation import check_validation


def test_a_run_that_has_ended() -> None:
    options = TrainNetworkOptions.from_args(argparse.Namespace(resume="s-state", max_train_steps=8))
    plan, done = run_plan(options, batches_per_epoch=4, resumed=TrainState(current_epoch=2, current_step=7))
    assert (plan.total_steps, done) == (8, 7)
    # the final files may be missing
    assert run_plan(options, batches_per_epoch=4, resumed=TrainState(current_epoch=2, current_step=8))[1] == 8
    with pytest.raises(UserError, match="--resume s-state: the state is of step 9 and the run ends at step 8"):
        run_plan(options, batches_per_epoch=4, resumed=TrainState(current_epoch=3, current_step=9))


def test_a_run_that_was_stopped_early() -> None:
    validating = SimpleNamespace(validates=True)
    patient = ValidationOptions(early_stopping_patience=3)
    state = TrainState(current_epoch=1, current_step=4, validation={"loss": 0.5, "step": 2, "misses": 2})
    check_validation(validating, patient, state)
    state.validation["misses"] = 3
    check_validation(validating, ValidationOptions(), state)
    with pytest.raises(UserError, match="--early_stopping_patience 3: the state of --resume has seen 3 validations"):
        check_validation(validating, patient, state)


class Evil:
    """Makes a folder when it is unpickled as it wants."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def prepare(accelerator: Accelerator, module: torch.nn.Module) -> None:
    """Let the accelerator's states hold the module, with an optimizer and a schedule."""
    optimizer = torch.optim.AdamW(accelerator.prepare_model(module).parameters())
    accelerator.prepare_scheduler(torch.optim.lr_scheduler.ConstantLR(accelerator.prepare_optimizer(optimizer)))


def load(accelerator: Accelerator) -> None:
    load_state(accelerator, Path("state"), starts_from="--network_weights")


@pytest.mark.parametrize("file", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_code_in_a_state_is_not_run(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """States come from the Hub too."""
    monkeypatch.chdir(tmp_path)
    prepare(accelerator, torch.nn.Linear(1, 1))
    accelerator.save_state("state")
    load(accelerator)
    assert Path("state", file).exists()
    torch.save({"state": Evil()}, Path("state", file))
    if file == "random_states_0.pkl":  # nothing depends on these, and accelerate goes on without them
        load(accelerator)
    else:
        with pytest.raises(UserError, match="--resume state: a file of it holds more than tensors and numbers"):
            load(accelerator)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("file", ["optimizer.bin", "scheduler.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [{}, {"state": 1, "param_groups": 2}, [1, 2], None])
def test_edited_files_of_a_state(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, file: str, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(accelerator, torch.nn.Linear(1, 1))
    accelerator.save_state("state")
    if content is None:
        Path("state", file).unlink()
    else:
        torch.save(content, Path("state", file))
    if file == "scheduler.bin" and content is not None:
        return  # a schedule takes whatever it finds
    with pytest.raises(UserError, match="--resume state") as raised:
        load(accelerator)
    assert len(str(raised.value).splitlines()) == 1


def test_a_state_of_another_network(tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences that the options alone do not show, such as ``--network_args conv_dim=8``."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    prepare(accelerator, model)
    accelerator.save_state("state")
    model[0].weight = torch.nn.Parameter(torch.ones(1, 2))
    with pytest.raises(UserError, match=r"--resume state: it was saved with another network .*size mismatch") as raised:
        load(accelerator)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("before", "given", "words"),
    [
        ({"optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)"}, {}, None),
        (
            {"optimizer": "lion_pytorch.lion_pytorch.Lion"},
            {},
            "the optimizer lion_pytorch.lion_pytorch.Lion, not torch",
        ),
        ({"--network_dim": 4}, {"network_dim": 8}, "--network_dim 4, not 8"),
        ({"--network_dim": 4}, {}, None),
        ({"--network_dim": 4}, {"network_dim": 8, "dim_from_weights": True}, None),
        (
            {"--network_module": "networks.oft"},
            {"network_module": "networks.lora"},
            "--network_module networks.oft, not",
        ),
        (
            {"--network_train_unet_only": False},
            {"network_train_unet_only": True},
            "--network_train_unet_only False, not",
        ),
        ({"--learning_rate": 1.0}, {"learning_rate": 2.0}, None),
        ({"--lr_scheduler": "cosine"}, {"lr_scheduler": "linear", "lr_scheduler_args": ["power=1"]}, None),
        (
            {"--lr_scheduler_args": ["gamma=1"]},
            {"lr_scheduler_type": "StepLR"},
            r"--lr_scheduler_args .'gamma=1'., not",
        ),
        ({"--lr_scheduler_type": "StepLR"}, {}, "--lr_scheduler_type StepLR, not without it; a schedule of"),
        ({}, {"network_dim": 8}, None),
    ],
)
def test_what_the_options_tell(before: dict[str, object], given: dict[str, object], words: str | None) -> None:
    state = TrainState(current_epoch=1, current_step=1, fingerprint=before)
    options = TrainNetworkOptions.from_args(argparse.Namespace(resume="s", **given))
    optimizer = resolve_optimizer("", False, False, None, 1e-3)
    if words is None:
        check_fits(state, options, optimizer, shaping=Adapter.shaping_options(options), starts_from="--network_weights")
        return
    with pytest.raises(UserError, match=f"--resume s: it was saved with {words}"):
        check_fits(state, options, optimizer, shaping=Adapter.shaping_options(options), starts_from="--network_weights")
