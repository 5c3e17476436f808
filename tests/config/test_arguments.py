"""Dataclasses, parser and ``--help`` beyond the published table."""

from __future__ import annotations

import argparse
import dataclasses
import re

import pytest

from library.config.arguments import build_parser, flat, hide_secrets
from library.training.kinds.adapter_options import TrainNetworkOptions

GROUPS = list(TrainNetworkOptions.groups().values())
FIELDS = [field for group in GROUPS for field in dataclasses.fields(group)]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser(GROUPS, description="What it trains.", epilog="an example: 10% of it")


def test_every_flag_has_one_group_and_one_spelling(parser: argparse.ArgumentParser) -> None:
    names = [field.name for field in FIELDS]
    assert len(names) == len(set(names)) >= 193  # the published ones; tests/compat/ compares them one by one
    for action in parser._actions[1:]:
        assert action.option_strings == [f"--{action.dest}"]
        assert not action.required


def test_help_explains_every_flag(parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # one line for each flag
    text = parser.format_help()
    assert text.startswith("usage: ") and "[options]\n\nWhat it trains.\n" in text
    assert "an example: 10% of it" in text
    for group in GROUPS:
        assert f"\n{group.__doc__.splitlines()[0].rstrip('.')}:\n" in text
    for field in FIELDS:
        line = re.search(rf"^  --{field.name}(?: .*)?$", text, re.MULTILINE)
        assert line is not None, field.name
        explained = line.group() + text[line.end() :].partition("\n  --")[0]
        assert field.metadata["help"] in explained
        if field.default not in (None, "", False):
            assert f"(default: {field.default})" in explained
    assert "{None" not in text and "%%" not in text


def test_options_are_frozen_and_nothing_is_rewritten() -> None:
    given = argparse.Namespace(text_encoder_lr=[1e-5], caption_extention=".txt")
    options = TrainNetworkOptions.from_args(given)
    assert (options.dataset.caption_extention, options.dataset.caption_extension) == (".txt", ".caption")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.model.v2 = True  # type: ignore[misc]
    assert vars(given) == {"text_encoder_lr": [1e-5], "caption_extention": ".txt"}


def test_a_parsed_command_line_and_an_empty_namespace_agree(parser: argparse.ArgumentParser) -> None:
    assert TrainNetworkOptions.from_args(parser.parse_args([])) == TrainNetworkOptions.from_args(argparse.Namespace())


def test_exactly_the_secrets_are_marked() -> None:
    options = TrainNetworkOptions.from_args(argparse.Namespace())
    secret = {field.name for field, _ in flat(options) if field.metadata["secret"]}
    assert secret == {"huggingface_token", "wandb_api_key"}


def test_secrets_are_blotted_out_of_a_command_line() -> None:
    words = ["train.py", "--huggingface_token", "hf_1", "--wandb_api_key=k3y", "--output_name", "hf"]
    hide_secrets(
        TrainNetworkOptions.from_args(argparse.Namespace(huggingface_token="hf_1", wandb_api_key="k3y")), words
    )
    assert words == ["train.py", "--huggingface_token", "***", "--wandb_api_key=***", "--output_name", "hf"]
