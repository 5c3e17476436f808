"""The families' minimal inference scripts: what all of them have, from their tables."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.architectures.minimal_inference import MinimalInference
from library.architectures.registry import minimal_inferences
from library.errors import UserError
from library.inference.minimal_script import check_options, generate_with, minimal_parser
from tests.fixtures.runs import ROOT
from tests.fixtures.tiny_sd3 import make_tiny_sd3

ALL = minimal_inferences()


def options_of(inference: MinimalInference, **given: Any) -> Any:
    return inference.options.from_args(argparse.Namespace(**given))


@pytest.mark.parametrize("folder", ALL)
def test_tables_fit_their_options(folder: str) -> None:
    inference = ALL[folder]
    flags = {f for action in minimal_parser(None, inference)._actions for f in action.option_strings}
    assert {inference.model_flag, inference.lora_flag} <= flags
    request = inference.request(options_of(inference))
    assert {"width", "height", "scale"} <= request.settings.keys() and not request.interactive
    assert {f"--{inference.flags.get('scale', 'scale')}", f"--{inference.flags.get('steps', 'steps')}"} <= flags


@pytest.mark.parametrize("folder", ALL)
def test_a_folder_that_is_a_file(folder: str, tmp_path: Path) -> None:
    inference = ALL[folder]
    name = inference.flags.get("output_dir", "output_dir")
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=f"--{name} .*: is a file"):
        check_options(inference, options_of(inference, **{name: str(tmp_path / "out")}))


def test_no_table_imports_torch() -> None:
    code = (
        "import sys; from library.architectures.registry import minimal_inferences; minimal_inferences();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_stable_diffusion_3_generates(tmp_path: Path, own_root_logger: None) -> None:
    (tmp_path / "model").mkdir()
    made = make_tiny_sd3(tmp_path / "model")
    given = {name.removeprefix("--"): value for name, value in made.flags.items()}
    ckpt = given.pop("pretrained_model_name_or_path")
    inference = ALL["sd3"]
    size = {"width": 64, "height": 64, "steps": 1, "output_dir": str(tmp_path / "out"), "ckpt_path": str(ckpt)}
    (image,) = generate_with(inference, options_of(inference, **{**given, **size}))
    assert image.exists()
