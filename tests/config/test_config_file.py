"""``--config_file``: values, precedence and clear mistakes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from library.config.arguments import TrainNetworkOptions, build_parser
from library.config.config_file import load_toml, read_args
from library.config.fields import int_or_float
from library.errors import UserError


@pytest.fixture()
def parser() -> argparse.ArgumentParser:
    return build_parser(list(TrainNetworkOptions.groups().values()), description=None, epilog=None)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_75_tokens_are_those_without_the_option(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guides name them among the choices; the published flag has the others alone."""
    file = write(tmp_path / "run.toml", "max_token_length = 75")
    assert read_args(parser, ["--config_file", file]).max_token_length is None
    file = write(tmp_path / "run.toml", "max_token_length = 225")
    assert read_args(parser, ["--config_file", file]).max_token_length == 225
    assert read_args(parser, ["--config_file", file, "--max_token_length", "75"]).max_token_length is None
    write(tmp_path / "run.toml", "max_token_length = 'long'")
    with pytest.raises(SystemExit, match="2"):
        read_args(parser, ["--config_file", file])
    assert "max_token_length: expects 75, 150 or 225, not 'long'" in capsys.readouterr().err


def test_values_of_every_kind(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.toml",
        "output_dir = 'out'\n[a]\nnetwork_dim = 8\nlearning_rate = 1\nsdpa = true\n[a.b]\nresolution = [512, 768]\n"
        "text_encoder_lr = 1e-5\nnetwork_args = ['conv_dim=4', 'conv_alpha=1']\nlr_warmup_steps = '10%'\n"
        "dataset_config = 'data.toml'\n",
    )
    args = read_args(parser, ["--config_file", file])
    assert (args.output_dir, args.network_dim, args.learning_rate, args.sdpa) == ("out", 8, 1.0, True)
    assert args.resolution == "512,768"
    assert args.text_encoder_lr == [1e-5]
    assert args.network_args == ["conv_dim=4", "conv_alpha=1"]
    assert args.lr_warmup_steps == pytest.approx(0.1)
    assert args.dataset_config == Path("data.toml")


def test_the_command_line_wins_even_with_a_default(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", "network_alpha = 8\nseed = 3\n")
    args = read_args(parser, ["--config_file", file, "--network_alpha", "1"])
    assert (args.network_alpha, args.seed) == (1.0, 3)


def test_the_ending_may_be_left_out(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    write(tmp_path / "run.toml", "seed = 3\n")
    assert read_args(parser, ["--config_file", str(tmp_path / "run")]).seed == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = 1\nnetwork_dmi = 4\n", [":2:", "network_dmi", 'did you mean "network_dim"']),
        ("network_dim = 4.5\n", [":1:", "network_dim", "whole number"]),
        ("network_dim = true\n", ["network_dim", "whole number"]),
        ("sdpa = 1\n", ["sdpa", "true or false"]),
        ("mixed_precision = 'bf61'\n", ["mixed_precision", "bf16"]),
        ("lr_warmup_steps = 1.5\n", ["lr_warmup_steps", "between 0 and 1"]),
        ("seed = = 2\n", ["not valid TOML", "line 1"]),
        ("a.network_dmi = 4\n", [":1:", "network_dmi"]),
        ("[a]\nseed = 1\n[b]\nseed = 2\n", [":2:", "seed: given 2 times (lines 2, 4)"]),
        ("network_args = [['conv_dim=4']]\n", [":1:", "network_args: expects text"]),
        ("[[network_args]]\nconv_dim = 4\n", [":1:", "network_args: expects text"]),
        ("config_file = 'other.toml'\n", [":1:", "belongs on the command line only"]),
        ("learning_rate = '1e-4'\n", [":1:", "expects a number, not '1e-4'"]),
        ("lr_warmup_steps = nan\n", [":1:", "a share of the run"]),
        ("dry_run = true\n", [":1:", "belongs on the command line only"]),
        ("a = {seed = 1, network_dmi = 4}\n", [":1:", "network_dmi"]),
        ('caption_prefix = """\nsede = 3\n"""\n\nsede = 3\n', [":5:", 'did you mean "seed"']),
    ],
)
def test_mistakes(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    file = write(tmp_path / "run.toml", text)
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--config_file", file])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "run.toml" in message
    assert all(word in message for word in words), message


def test_all_mistakes_at_once(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "run.toml", "aa = 1\nbb = 2\n")
    with pytest.raises(SystemExit):
        read_args(parser, ["--config_file", file])
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--netwrok_dim", "4"], 'unknown option --netwrok_dim (did you mean "--network_dim"?)'),
        (["--network_dim", "x"], "invalid int value: 'x'"),
        (["--lr_warmup_steps", "1.5"], "between 0 and 1"),
        (["--lr_warmup_steps", "nan%"], "between 0 and 1"),
        (["--lr_warmup_steps=-5%"], "between 0 and 1"),
        (["--network_di", "4"], 'unknown option --network_di (did you mean "--network_dim"?)'),
        (["--netwrok_dim=4", "--unett_lr", "1"], 'error: unknown option --unett_lr (did you mean "--unet_lr"?)'),
        (["stray"], "'stray' belongs to no option"),
    ],
)
def test_command_line_mistakes(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, words)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("100", 100), ("0", 0), ("0.1", 0.1), ("10%", 0.1), ("1.0", 1.0), ("100%", 1.0)]
)
def test_steps_or_share(parser: argparse.ArgumentParser, text: str, value: float) -> None:
    parsed = read_args(parser, ["--lr_warmup_steps", text]).lr_warmup_steps
    assert parsed == pytest.approx(value)
    assert isinstance(parsed, type(value))


def test_output_config_is_read_back(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "made.toml"
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--output_config", "--config_file", str(file), "--network_dim", "4", "--sdpa"])
    assert stopped.value.code == 0
    args = read_args(parser, ["--config_file", str(file)])
    assert (args.network_dim, args.sdpa, args.learning_rate) == (4, True, 2e-06)
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--output_config", "--config_file", str(file)])
    assert stopped.value.code == 2


def other_value(field: dataclasses.Field) -> object:
    """A value that is not the default, of the option's own type."""
    given = field.metadata
    if field.default is False:
        return True
    if given["choices"]:
        return next(choice for choice in given["choices"] if choice not in (None, field.default))
    value = {int: 7, float: 1.5e-07, int_or_float: 0.25, Path: Path("a b/c.toml")}.get(given["type"], 'te"x\\t, {é}')
    return [value, value] if given["nargs"] else value


def test_every_option_survives_output_config(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    groups = TrainNetworkOptions.groups().values()
    fields = [field for group in groups for field in dataclasses.fields(group)]
    own = {"config_file", "output_config", "explain", "dry_run", "replay"}
    expected = {field.name: other_value(field) for field in fields if field.name not in own}
    assert all(value != field.default for field in fields if (value := expected.get(field.name)) is not None)
    words = ["--output_config", "--config_file", str(tmp_path / "all.toml")]
    for name, value in expected.items():
        words += [f"--{name}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, words)
    assert stopped.value.code == 0
    found = vars(read_args(parser, ["--config_file", str(tmp_path / "all.toml")]))
    secrets = {field.name for field in fields if field.metadata["secret"]}
    for name, value in expected.items():
        assert found[name] == (None if name in secrets else value), name
        assert name in secrets or type(found[name]) is type(value), name


def test_a_file_of_defaults_is_the_same_as_none(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "defaults.toml"
    with pytest.raises(SystemExit):
        read_args(parser, ["--output_config", "--config_file", str(file)])
    read = TrainNetworkOptions.from_args(read_args(parser, ["--config_file", str(file)]))
    plain = TrainNetworkOptions.from_args(read_args(parser, []))
    assert dataclasses.replace(read, config=plain.config) == plain


def test_output_config_leaves_secrets_out(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "made.toml"
    with pytest.raises(SystemExit):
        read_args(parser, ["--output_config", "--config_file", str(file), "--wandb_api_key", "k3y", "--seed", "4"])
    assert "k3y" not in file.read_text() and "seed = 4" in file.read_text()


@pytest.mark.parametrize(
    "text",
    [r"C:\new\x41", r"\\share\u0041", "a \"b\" 'c'", "two\nlines\tand a tab", "漢字", "\x7f\x01", "{a|b} # c", ""],
)
def test_output_config_keeps_every_text(parser: argparse.ArgumentParser, tmp_path: Path, text: str) -> None:
    file = tmp_path / "made.toml"
    words = ["--output_dir", text, "--network_args", text, "x=1", "--lr_warmup_steps", "10%"]
    words += ["--dataset_config", "d.toml"]
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--output_config", "--config_file", str(file), *words])
    assert stopped.value.code == 0
    args = read_args(parser, ["--config_file", str(file)])
    assert (args.output_dir, args.network_args, args.lr_warmup_steps) == (text, [text, "x=1"], 0.1)
    assert args.dataset_config == Path("d.toml")


def test_output_config_that_cannot_be_written(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--output_config", "--config_file", str(tmp_path / "no" / "made.toml")])
    assert stopped.value.code == 2
    assert "made.toml cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--output_config"])
    assert stopped.value.code == 2


def test_one_files_values_do_not_reach_the_next_parse(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    assert read_args(parser, ["--config_file", write(tmp_path / "run.toml", "seed = 3\n")]).seed == 3
    assert read_args(parser, []).seed is None


def test_a_byte_order_mark_is_no_mistake(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes("seed = 3\n".encode("utf-8-sig"))
    assert read_args(parser, ["--config_file", str(tmp_path / "run.toml")]).seed == 3


def test_another_encoding_is_named(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_bytes("output_name = 'é'\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        read_args(parser, ["--config_file", str(tmp_path / "run.toml")])
    assert "run.toml: cannot be read as UTF-8" in capsys.readouterr().err


def test_load_toml_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.toml: no such file"):
        load_toml(tmp_path / "no.toml")
