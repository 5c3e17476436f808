"""The command lines of the caching tools take every published flag, and besides those of training only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from library.architectures.tool_families import family_flags, family_options
from library.config.arguments import build_parser
from library.training.kinds.adapter_options import TrainNetworkOptions
from tools import cache_latents, cache_text_encoder_outputs

TOOLS = {"cache_latents": cache_latents, "cache_text_encoder_outputs": cache_text_encoder_outputs}
COUNTS = {"cache_latents": 160, "cache_text_encoder_outputs": 161}


def published(tool: str) -> list[dict]:
    return json.loads((Path(__file__).parent / "data" / "cli" / f"tools__{tool}.json").read_text())["options"]


def actions(tool: str) -> dict[str, argparse.Action]:
    return {action.dest: action for action in TOOLS[tool].setup_parser()._actions if action.dest != "help"}


@pytest.mark.parametrize("tool", TOOLS)
def test_no_flag_is_missing_or_new(tool: str) -> None:
    assert len(published(tool)) == COUNTS[tool]
    training = build_parser(list(TrainNetworkOptions.groups().values()), description=None, epilog=None)
    known = {action.dest for action in training._actions} | {o["dest"] for name in TOOLS for o in published(name)}
    known |= {*family_options().__dataclass_fields__, *family_flags()}
    assert {option["dest"] for option in published(tool)} <= set(actions(tool)) <= known


@pytest.mark.parametrize("tool", TOOLS)
def test_flags(tool: str) -> None:
    found = actions(tool)
    for option in published(tool):
        action = found[option["dest"]]
        assert set(option["flags"]) <= set(action.option_strings)
        assert action.default == option["default"], option["dest"]
        assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"]), option["dest"]
        assert (list(action.choices) if action.choices else None) == option["choices"], option["dest"]
        converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        assert converter == option["type"], option["dest"]


@pytest.mark.parametrize(
    ("tool", "relevant", "there", "not_there"),
    [
        ("cache_latents", cache_latents.CacheLatents.relevant, {"vae", "vae_batch_size"}, "text_encoder_batch_size"),
        (
            "cache_text_encoder_outputs",
            cache_text_encoder_outputs.CacheTextEncoderOutputs.relevant,
            {"clip_skip", "max_token_length", "text_encoder_batch_size", "text_encoder_cache_variants"},
            "vae_batch_size",
        ),
    ],
)
def test_help_shows_what_matters_only(tool: str, relevant: set[str], there: set[str], not_there: str) -> None:
    shown = {dest for dest, action in actions(tool).items() if action.help != argparse.SUPPRESS}
    assert shown == set(relevant)
    assert {"dataset_config", "skip_cache_check", "mixed_precision", *there} <= shown
    text = TOOLS[tool].setup_parser().format_help()
    assert f"accelerate launch tools/{tool}.py" in text
    assert "--learning_rate" not in text and f"--{not_there}" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flux", "--sdxl"], "--sdxl and --flux exclude each other"),
        (
            ["--t5xxl", "t5.safetensors"],
            "--t5xxl: not for Stable Diffusion 1.x and 2.x; remove it, or add --flux or --sd3",
        ),
    ],
)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.usefixtures("own_root_logger")
def test_other_families_are_refused(
    tool: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cache_latents.CacheLatents() if tool == "cache_latents" else None
    made = made or cache_text_encoder_outputs.CacheTextEncoderOutputs()
    with pytest.raises(SystemExit) as ended:
        made.run(TOOLS[tool].setup_parser().parse_args(words))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
