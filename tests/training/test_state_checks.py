"""States that were edited, cut or damaged are refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.files.atomic import atomic_directory
from library.training.resume import read_state
from library.training.state_checks import refuse_bad_optimizer, refuse_bad_weights

RECORD = {"current_epoch": 1, "current_step": 5, "seed": 1, "fingerprint": {"seed": 1}, "losses": [0.5]}


def write_state(folder: Path, **changed: object) -> Path:
    with atomic_directory(folder) as target:
        (target / "train_state.json").write_text(json.dumps({**RECORD, **changed}), encoding="utf-8")
    return folder


def test_a_state_of_ours_without_its_manifest(tmp_path: Path) -> None:
    state = write_state(tmp_path / "state")
    assert read_state(state).current_step == 5
    (state / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"--resume .*state: manifest\.json is missing"):
        read_state(state)


def test_a_state_of_another_program_is_said_to_be_unchecked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train_state.json").write_text('{"current_epoch": 2, "current_step": 10}', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert read_state(tmp_path).current_step == 10
    assert "without a manifest: not checked" in caplog.text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"current_step": -5}, "current_step is -5"),
        ({"current_step": 2.5}, "current_step is 2.5"),
        ({"current_step": True}, "current_step is True"),
        ({"current_step": "7"}, "current_step is '7'"),
        ({"current_epoch": -1}, "current_epoch is -1"),
        ({"origin_step": None}, "origin_step is None"),
        ({"seed": "one"}, "seed is 'one'"),
        ({"losses": [float("nan")]}, "losses must be"),
        ({"losses": 3}, "losses must be"),
        ({"fingerprint": [1]}, "fingerprint must be"),
        ({"validation": 1}, "validation must be"),
    ],
)
def test_edited_records(tmp_path: Path, changed: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as found:
        read_state(write_state(tmp_path / "state", **changed))
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"current_step": 1}', "[" * 100_000 + "]" * 100_000])
def test_records_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "train_state.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"train_state\.json") as found:
        read_state(tmp_path)
    assert len(str(found.value).splitlines()) == 1


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    refuse_bad_weights(tmp_path)
    save_file({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}, tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match=r"ema\.safetensors: the tensor b holds NaN"):
        refuse_bad_weights(tmp_path)


def test_an_optimizer_that_is_not_finite(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    optimizer.state[parameter]["best"] = torch.tensor(float("inf"))  # not of the parameter's shape
    refuse_bad_optimizer(tmp_path, optimizer)
    optimizer.state[parameter]["exp_avg"][1] = float("inf")
    with pytest.raises(UserError, match="the optimizer's state is damaged: the tensor exp_avg of parameter 0"):
        refuse_bad_optimizer(tmp_path, optimizer)
