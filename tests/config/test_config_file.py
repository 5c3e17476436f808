"""``--config_file``: values, precedence and clear mistakes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from library.config.arguments import build_parser
from library.config.config_file import read_args
from library.config.fields import int_or_float
from library.config.foreign_keys import is_known, typing_mistake_of
from library.config.toml_file import load_toml
from library.errors import UserError
from library.training.kinds.adapter_options import TrainNetworkOptions


@pytest.fixture()
def parser() -> argparse.ArgumentParser:
    return build_parser(list(TrainNetworkOptions.groups().values()), description=None, epilog=None)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


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
        ("sdpa = 2\n", ["sdpa", "true or false"]),
        ("sdpa = 'yes'\n", ["sdpa", "true or false"]),
        ("mixed_precision = 'bf61'\n", ["mixed_precision", "bf16"]),
        ("lr_warmup_steps = 1.5\n", ["lr_warmup_steps", "between 0 and 1"]),
        ("seed = = 2\n", ["not valid TOML", "line 1"]),
        ("a.network_dmi = 4\n", [":1:", "network_dmi"]),
        ("[a]\nseed = 1\n[b]\nseed = 2\n", [":2:", "seed: given 2 times (lines 2, 4), as 1 and 2; "]),
        ("network_args = [['conv_dim=4']]\n", [":1:", "network_args: expects text"]),
        ("[[network_args]]\nconv_dim = 4\n", [":1:", "network_args: expects text"]),
        ("config_file = 'other.toml'\n", [":1:", "belongs on the command line only"]),
        ("learning_rate = 'fast'\n", [":1:", "expects a number, not 'fast'"]),
        ("lr_warmup_steps = nan\n", [":1:", "a fraction of the run"]),
        ("dry_run = true\n", [":1:", "belongs on the command line only"]),
        ("a = {seed = 1, network_dmi = 4}\n", [":1:", "network_dmi"]),
        ("sdpa = True\n", ["line 1", "true or false, in small letters"]),
        ("seed = 1\noutput_dir = /home/me\n", ["line 2", "texts are quoted"]),
        ('output_dir = "C:\\out"\n', ["line 1", "single quotes"]),
        ('[a]\noutput_dir = "C:\\new"\n', ["C:\\new", "single quotes"]),
        ("learning_rate = 1e-4,\n", ["line 1", "decimal point"]),
        ("learning_rate = 0,0001\n", ["line 1", "decimal point"]),
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
    file = write(tmp_path / "run.toml", "sedd = 1\nnetwork_dom = 2\n")
    with pytest.raises(SystemExit):
        read_args(parser, ["--config_file", file])
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--netwrok_dim", "4"], 'unknown option --netwrok_dim (did you mean "--network_dim"?)'),
        (["--network_dim", "x"], "error: --network_dim x: write a whole number"),
        (["--learning_rate", "1e-4,"], "error: --learning_rate 1e-4,: write a number, such as 0.0001"),
        (["--learning_rate", "-1e-4"], "error: --learning_rate: a value is missing (one that begins with a hyphen"),
        (["--mixed_precision", "BF16"], '--mixed_precision BF16: write one of no, fp16, bf16 (did you mean "bf16"?)'),
        (["--save_model_as", "safetensor"], "write one of ckpt, pt, safetensors"),
        (["--sdpa", "true"], "'true' belongs to no option; switches take no value"),
        (["--sdpa=true"], "error: --sdpa=true: a switch takes no value; write --sdpa alone"),
        (["\N{EN DASH}seed", "3"], "begins with a long dash; write two plain hyphens: --seed"),
        (["--sdpa\r"], "Windows line endings"),
        (["--seed", "3", "\r"], "Windows line endings"),
        (["--gemma2", "g"], "error: unknown option --gemma2, which other training scripts have; remove it"),
        (["--lr_warmup_steps", "1.5"], "between 0 and 1"),
        (["--lr_warmup_steps", "nan%"], "between 0 and 1"),
        (["--lr_warmup_steps=-5%"], "between 0 and 1"),
        (["--network_di", "4"], 'unknown option --network_di (did you mean "--network_dim"?)'),
        (["--netwrok_dim=4", "--unett_lr", "1"], 'error: unknown option --unett_lr (did you mean "--unet_lr"?)'),
        (["stray"], "'stray' belongs to no option"),
        (["--sdpa", " "], "one of its lines ends in a backslash and a space"),
        (["--network_args", "conv_dim=4", " "], "one of its lines ends in a backslash and a space"),
        (["--seed", "3", "--seed", "4"], "error: --seed: given twice, as 3 and as 4; give it once"),
        (["--config_file", "a.toml", "--config_file", "b.toml"], "--config_file: given twice, as a.toml and as b.toml"),
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
    # an empty text leaves an option out
    kept = [text, "x=1"] if text else ["x=1"]
    assert (args.output_dir or "", args.network_args, args.lr_warmup_steps) == (text, kept, 0.1)
    assert args.dataset_config == Path("d.toml")


def test_output_config_that_cannot_be_written(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--output_config", "--config_file", str(tmp_path / "no" / "made.toml")])
    assert stopped.value.code == 2
    assert "made.toml: cannot be written" in capsys.readouterr().err
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


def test_lists_that_are_given_twice_are_joined(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    words = ["--network_args", "a=1", "--seed", "3", "--network_args", "b=2", "c=3", "--seed", "3"]
    args = read_args(parser, words)
    assert (args.network_args, args.seed) == (["a=1", "b=2", "c=3"], 3)
    # tables are only headings; the command line wins over the file, as a whole
    file = write(
        tmp_path / "run.toml", "[a]\nnetwork_args = ['x=1']\nseed = 1\n[b]\nnetwork_args = ['y=2']\nseed = 1\n"
    )
    assert read_args(parser, ["--config_file", file]).network_args == ["x=1", "y=2"]
    assert read_args(parser, ["--config_file", file, *words]).network_args == ["a=1", "b=2", "c=3"]
    assert read_args(parser, []).network_args is None


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("sdpa = 1", "sdpa", True),
        ("sdpa = 0", "sdpa", False),
        ("bucket_reso_steps = 32.0", "bucket_reso_steps", 32),
        ("learning_rate = '1e-4'", "learning_rate", 1e-4),
        ("seed = '7'", "seed", 7),
        ("vae = 'None'", "vae", None),
        ("vae = ''", "vae", None),
        ("caption_separator = ''", "caption_separator", ","),
        ("save_precision = 'None'", "save_precision", None),
        ("network_args = []", "network_args", None),
        ("network_args = ['', 'None', 'conv_dim=4']", "network_args", ["conv_dim=4"]),
        ("dynamo_backend = 'no'", "dynamo_backend", "no"),
        ("max_token_length = 75", "max_token_length", 75),
        ("resolution = '512,512'\n[dataset]\nresolution = '512,512'", "resolution", "512,512"),
        ("lr_restart_cycles = 3", "lr_scheduler_num_cycles", 3),
        ("lr_restart_cycles = 3\nlr_scheduler_num_cycles = 2", "lr_scheduler_num_cycles", 2),
        ("loraplus_lr_ratio = 4", "network_args", ["loraplus_lr_ratio=4"]),
        ("loraplus_lr_ratio = 4\nnetwork_args = ['conv_dim=4']", "network_args", ["conv_dim=4", "loraplus_lr_ratio=4"]),
        ("loraplus_lr_ratio = 4\nnetwork_args = ['loraplus_lr_ratio=8']", "network_args", ["loraplus_lr_ratio=8"]),
        ("loraplus_lr_ratio = 0", "network_args", None),
    ],
)
def test_what_programs_write(
    parser: argparse.ArgumentParser, tmp_path: Path, text: str, name: str, value: object
) -> None:
    args = read_args(parser, ["--config_file", write(tmp_path / "run.toml", text + "\n")])
    assert getattr(args, name) == value


def test_keys_of_other_programs_are_accepted_in_one_line(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["epoch", "noise_offset_type", "mem_eff_save", "gemma2", "lowvram", "tag_occurrence", "save_toml"]
    file = write(tmp_path / "run.toml", "".join(f"{key} = 1\n" for key in keys) + "seed = 3\n")
    assert read_args(parser, ["--config_file", file, "--strict"]).seed == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{file}: ignored, as they are for other programs or scripts: {', '.join(keys)}"


def test_unknown_keys_warn_and_are_errors_under_strict(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "run.toml", "seed = 3\nmy_own_note = 'x'\ntrain_steps_max = 3\n")
    assert read_args(parser, ["--config_file", file]).seed == 3
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {file}:2: my_own_note: unknown option; it is ignored",
        f'warning: {file}:3: train_steps_max: unknown option (did you mean "max_train_steps"?); it is ignored',
    ]
    with pytest.raises(SystemExit) as stopped:
        read_args(parser, ["--config_file", file, "--strict"])
    assert stopped.value.code == 2
    assert "my_own_note: unknown option (an error by --strict)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "option"),
    [("network_dmi", "network_dim"), ("sede", "seed"), ("learning_rates", "learning_rate"), ("unet_lrr", "unet_lr"),
     ("train_unet_only", None), ("lr", None), ("vaee", "vae"), ("ema_dcay", "ema_decay"), ("caption", None)],
)  # fmt: skip
def test_a_typing_mistake_is_a_letter_or_two_away(
    parser: argparse.ArgumentParser, key: str, option: str | None
) -> None:
    assert typing_mistake_of(key, [action.dest for action in parser._actions]) == option


def test_no_option_is_taken_for_a_typing_mistake_of_another_script(parser: argparse.ArgumentParser) -> None:
    """A key that some script has is known to all, however near it is to another option."""
    for path in sorted((Path(__file__).parents[1] / "compat" / "data" / "cli").glob("*train*.json")):
        for option in json.loads(path.read_text())["options"]:
            names = {action.dest for action in parser._actions}
            assert option["dest"] in names or is_known(option["dest"]), option["dest"]
