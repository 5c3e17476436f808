"""Options that are not set, as programs that start the scripts write them: all of their fields, many of them empty."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from library.config.arguments import ConfigFileOptions, build_parser, flat
from library.config.config_file import read_args
from library.config.rules import check
from library.training.kinds.adapter_options import TrainNetworkOptions
from tests.fixtures.subjects import SD

NEEDED = {
    "pretrained_model_name_or_path": "model.safetensors",
    "train_data_dir": ".",
    "output_dir": "out",
    "network_module": "networks.lora",
    "learning_rate": "1e-4",
}


@pytest.fixture()
def parser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> argparse.ArgumentParser:
    monkeypatch.chdir(tmp_path)
    return build_parser(list(TrainNetworkOptions.groups().values()), description=None, epilog=None)


def options_of(parser: argparse.ArgumentParser, *words: str) -> TrainNetworkOptions:
    needed = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]
    options = TrainNetworkOptions.from_args(read_args(parser, [*needed, *words]))
    return dataclasses.replace(options, config=ConfigFileOptions())


def without_default(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    kept = (*NEEDED, "help", "config_file", "replay", "explain")
    return [action for action in parser._actions if action.default is None and action.dest not in kept]


def test_an_empty_text_is_none(parser: argparse.ArgumentParser) -> None:
    texts = [action.dest for action in without_default(parser) if action.type in (str, Path)]
    assert {"resume", "vae", "dataset_config", "network_args", "log_with", "huggingface_repo_type"} <= set(texts)
    options = options_of(parser, *(word for name in texts for word in (f"--{name}", "")))
    assert options == options_of(parser)
    assert check(options, SD) == []


def test_in_a_file_that_holds_for_numbers_too(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    names = [action.dest for action in without_default(parser)]
    assert {"unet_lr", "text_encoder_lr", "clip_skip", "max_token_length"} <= set(names)
    (tmp_path / "run.toml").write_text("".join(f'{name} = ""\n' for name in names))
    assert options_of(parser, "--config_file", "run.toml") == options_of(parser)


def test_an_empty_text_of_the_command_line_wins(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("vae = 'v.safetensors'\nresume = 's'\n")
    options = options_of(parser, "--config_file", "run.toml", "--vae", "")
    assert (options.model.vae, options.resume.resume) == (None, "s")


def test_every_default_may_be_written_out(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    defaults = {f.name: f.default for f, _ in flat(options_of(parser)) if f.default is not None}
    for name in ("output_config", "explain", "dry_run", *NEEDED):
        defaults.pop(name, None)
    (tmp_path / "run.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in defaults.items()))
    words = [word for name, v in defaults.items() if v is not False for word in (f"--{name}", str(v))]
    for given in (["--config_file", "run.toml"], words):
        options = options_of(parser, *given)
        assert options == options_of(parser)
        assert check(options, SD) == []


def test_lists_leave_empty_words_out(parser: argparse.ArgumentParser) -> None:
    options = options_of(parser, "--network_args", "", "conv_dim=4", "")
    assert options.network.network_args == ["conv_dim=4"]


@pytest.mark.parametrize("by_file", [False, True])
def test_75_tokens_are_the_default(parser: argparse.ArgumentParser, tmp_path: Path, by_file: bool) -> None:
    (tmp_path / "run.toml").write_text("max_token_length = 75\n")
    words = ["--config_file", "run.toml"] if by_file else ["--max_token_length", "75"]
    assert options_of(parser, *words).model.max_token_length is None


def test_choices_are_shown_without_none(parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of(parser, "--max_token_length", "100")
    assert "--max_token_length 100: write one of 150, 225" in capsys.readouterr().err
