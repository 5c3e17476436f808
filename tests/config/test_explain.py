"""``--explain``: every option with its value, its origin and a note; nothing secret."""

from __future__ import annotations

import argparse
import dataclasses
import io
from pathlib import Path

import pytest

from library.config.arguments import build_parser, flat
from library.config.config_file import origins_of, read_args
from library.config.explain import Row, explanation, print_explanation
from library.config.implied import _FOLLOWS, implied
from library.optim.optimizers import resolve_optimizer
from library.training.kinds.adapter_options import TrainNetworkOptions
from tests.fixtures.subjects import SD


@pytest.fixture()
def parser() -> argparse.ArgumentParser:
    return build_parser(list(TrainNetworkOptions.groups().values()), description=None, epilog=None)


def options(**given: object) -> TrainNetworkOptions:
    return TrainNetworkOptions.from_args(argparse.Namespace(**given))


def rows_of(args: argparse.Namespace) -> dict[str, Row]:
    return {row.name: row for row in explanation(TrainNetworkOptions.from_args(args), origins_of(args), SD.declaration)}


def test_every_option_has_its_origin(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "# a comment\n[network]\nnetwork_dim = 8\nnetwork_alpha = 4\n\n[rates]\nlearning_rate = 1e-4\n"
        "caption_prefix = '''\nnetwork_dim = 99\n'''\nnetwork_args = ['conv_dim=4']\n",
        encoding="utf-8",
    )
    words = ["--config_file", str(file), "--network_alpha", "1", "--sdpa", "--seed", "5"]
    args = read_args(parser, words)
    rows = rows_of(args)
    in_order = [field.name for group in TrainNetworkOptions.groups().values() for field in dataclasses.fields(group)]
    assert list(rows) == in_order and set(rows) == {field.name for field, _ in flat(options())}
    assert (rows["network_dim"].value, rows["network_dim"].origin) == ("8", f"{file}:3")
    # the command line wins, and says so even where it gives the default
    assert (rows["network_alpha"].value, rows["network_alpha"].origin) == ("1.0", "command line")
    assert (rows["sdpa"].value, rows["sdpa"].origin) == ("yes", "command line")
    assert (rows["network_args"].value, rows["network_args"].origin) == ("conv_dim=4", f"{file}:11")
    assert (rows["unet_lr"].value, rows["unet_lr"].origin) == ("0.0001", "follows from --learning_rate")
    assert (rows["xformers"].value, rows["xformers"].origin) == ("no", "default")
    assert (rows["vae"].value, rows["vae"].origin) == ("-", "default")
    assert "origins" not in vars(args)


def test_a_namespace_of_a_program(parser: argparse.ArgumentParser) -> None:
    rows = rows_of(argparse.Namespace(network_dim=4))
    assert rows["network_dim"].origin == "set by a program"
    assert rows["network_alpha"].origin == "default"


def test_secrets_are_masked(parser: argparse.ArgumentParser) -> None:
    args = read_args(parser, ["--wandb_api_key", "k3y", "--huggingface_token", "t0ken"])
    rows = rows_of(args)
    assert (rows["wandb_api_key"].value, rows["wandb_api_key"].origin) == ("(hidden)", "command line")
    assert rows_of(read_args(parser, []))["wandb_api_key"].value == "-"
    printed = io.StringIO()
    print_explanation(TrainNetworkOptions.from_args(args), origins_of(args), SD.declaration, file=printed)
    assert "k3y" not in printed.getvalue() and "t0ken" not in printed.getvalue()


def test_what_has_no_effect_and_what_is_refused_is_noted() -> None:
    given = options(huber_c=0.2, deepspeed=True, offload_param_nvme_path="x")
    rows = {row.name: row for row in explanation(given, {}, SD.declaration)}
    assert rows["huber_c"].note == "no effect without --loss_type huber or smooth_l1"
    assert rows["offload_param_nvme_path"].note.startswith("refused: ") and rows["deepspeed"].note == ""
    assert rows["huber_schedule"].note == ""


def printed(given: TrainNetworkOptions, origins: dict[str, str]) -> str:
    file = io.StringIO()
    print_explanation(given, origins, SD.declaration, file=file)
    return file.getvalue()


def test_one_line_for_each_option_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    origins = {"caption_prefix": "run.toml:3", "huber_c": "command line", "seed": "command line"}
    given = options(caption_prefix="[red]a [cat]", huber_c=0.2, seed=5, dataset_config=Path("d.toml"))
    text = printed(given, origins)
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "--dataset_config d.toml" and lines[0].endswith("(set by a program)")
    assert "--caption_prefix [red]a [cat]" in text and "(run.toml:3)" in text
    assert "--unet_lr 2e-06" in text and "(follows from --learning_rate)" in text
    (note,) = [below for line, below in zip(lines, lines[1:], strict=False) if line.startswith("--huber_c 0.2")]
    assert note == "    no effect without --loss_type huber or smooth_l1"
    assert "--sdpa" not in text and "--explain all shows them" in text
    assert "keys of d.toml win over the data options above" in text
    assert max(map(len, lines)) <= 80


def test_all_shows_every_option_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = options(explain="all", output_dir="a/" + "long/" * 30)
    text = printed(given, {"output_dir": "command line"})
    lines = text.splitlines()
    names = [field.name for field, _ in flat(given) if field.name != "explain"]
    assert all(any(line.startswith(f"--{name} ") for line in lines) for name in names)
    assert lines[0] == "Model" and "\nLoss\n" in text
    # a path stays in one piece, with its origin below
    place = lines.index(f"--output_dir {given.output.output_dir}")
    assert lines[place + 1] == "    (command line)"
    assert max(len(line) for line in lines if "long/" not in line) <= 80


IMPLIED = [
    ("caption_extension", {"caption_extention": ".cap"}, ".cap", "follows from --caption_extention"),
    ("cache_latents", {"cache_latents_to_disk": True}, True, "follows from --cache_latents_to_disk"),
    ("optimizer_type", {}, "AdamW", "default"),
    ("optimizer_type", {"use_8bit_adam": True}, "AdamW8bit", "follows from --use_8bit_adam"),
    ("optimizer_type", {"use_lion_optimizer": True}, "Lion", "follows from --use_lion_optimizer"),
    ("unet_lr", {"learning_rate": 0.5}, 0.5, "follows from --learning_rate"),
    ("unet_lr", {"network_train_text_encoder_only": True}, None, ""),
    ("embedding_lr", {"learning_rate": 0.5, "train_embedding": "qux"}, 0.5, "follows from --learning_rate"),
    ("embedding_lr", {"learning_rate": 0.5}, None, ""),
    ("text_encoder_lr", {"learning_rate": 0.5}, [0.5], "follows from --learning_rate"),
    ("text_encoder_lr", {"network_train_unet_only": True}, None, ""),
    ("text_encoder_lr", {"learning_rate": 0.5, "text_encoder_lr2": 0.1}, [0.5, 0.1], "follows from --text_encoder_lr2"),
    ("max_train_steps", {"max_train_epochs": 3}, "(steps of 3 epochs)", "follows from --max_train_epochs"),
    ("save_every_n_epochs", {"save_n_epoch_ratio": 4}, "(epochs / 4)", "follows from --save_n_epoch_ratio"),
    ("save_last_n_epochs_state", {"save_last_n_epochs": 2, "save_state": True}, 2, "follows from --save_last_n_epochs"),
    ("save_last_n_steps_state", {"save_last_n_steps": 9, "save_state": True}, 9, "follows from --save_last_n_steps"),
    ("save_last_n_steps_state", {"save_last_n_steps": 9}, None, ""),
    ("logging_dir", {"output_dir": "out"}, "out/logs", "follows from --output_dir"),
    ("base_weights_multiplier", {"base_weights": ["a", "b"]}, [1.0, 1.0], "follows from --base_weights"),
    ("metadata_title", {"output_name": "n"}, "n", "follows from --output_name"),
    (
        "lr_scheduler_timescale",
        {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 7},
        7,
        "follows from --lr_warmup_steps",
    ),
    ("seed", {}, "(drawn)", "default"),
    ("seed", {"resume": "state"}, "(that of the state)", "follows from --resume"),
    ("max_token_length", {}, 75, "default"),
    ("output_name", {}, "last", "default"),
    ("save_precision", {}, "float", "default"),
    ("save_precision", {"full_bf16": True}, "bf16", "follows from --full_bf16"),
    ("min_timestep", {}, 0, "default"),
    ("max_timestep", {}, 1000, "default"),
    ("log_with", {}, "tensorboard", "default"),
    ("log_tracker_name", {}, "network_train", "default"),
    ("console_log_level", {}, "INFO", "default"),
]


@pytest.mark.parametrize(("name", "given", "value", "origin"), IMPLIED, ids=lambda v: v if isinstance(v, str) else "")
def test_implied(name: str, given: dict[str, object], value: object, origin: str) -> None:
    found = implied(options(**given), SD.declaration).get(name)
    assert (found.value, found.origin) == (value, origin) if found else (None, "") == (value, origin)


def test_swapped_blocks_are_checkpointed() -> None:
    from flux_train_network import FluxNetworkTrainer

    given = FluxNetworkTrainer.joined_options().from_args(argparse.Namespace(blocks_to_swap=2))
    found = implied(given, FluxNetworkTrainer.architecture.declaration)["gradient_checkpointing"]
    assert (found.value, found.origin) == (True, "follows from --blocks_to_swap")


def test_every_implication_has_a_case_and_an_option() -> None:
    assert {name for name, *_ in IMPLIED} == {*_FOLLOWS, *SD.declaration.follows}
    assert {*_FOLLOWS, *SD.declaration.follows} <= {field.name for field, _ in flat(options())}


def test_what_is_given_follows_from_nothing() -> None:
    assert "unet_lr" not in implied(options(unet_lr=0.1), SD.declaration)
    rows = {row.name: row for row in explanation(options(unet_lr=0.1), {"unet_lr": "command line"}, SD.declaration)}
    assert (rows["unet_lr"].value, rows["unet_lr"].origin) == ("0.1", "command line")


def test_implied_values_are_those_that_are_used(tmp_path: Path) -> None:
    """The table restates what other code does; here is that code."""
    from library.training.checkpoints import OutputNames
    from library.training.settings import noise_settings, tracker_settings

    plain = options(output_dir=str(tmp_path))
    values = {name: found.value for name, found in implied(plain, SD.declaration).items()}
    assert resolve_optimizer("", False, False, None, 1e-3).name == values["optimizer_type"]
    assert OutputNames(tmp_path, None, "safetensors").final().stem == values["output_name"]
    noise = noise_settings(plain)
    assert (noise.min_timestep, noise.max_timestep) == (values["min_timestep"], values["max_timestep"])
    trackers = tracker_settings(plain)
    assert str(trackers.directory.parent) == values["logging_dir"]
    assert trackers.tracker_name == values["log_tracker_name"]
    assert trackers.backends == (values["log_with"],)
