"""The commands of docs/adapter_tools.md, run as they stand on tiny models."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from networks import lora, merge_lora, sdxl_merge_lora
from tests.fixtures.file_tools import ROOT, run_tool
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tests.networks.test_merge_lora import Checkpoint, make

pytestmark = pytest.mark.usefixtures("own_root_logger")

PAGE = (ROOT / "docs" / "adapter_tools.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^python .*$", PAGE, re.MULTILINE)]
#: options for tiny models: where the tokenizer is
TINY = {"networks/lora_interrogator.py": ["--tokenizer_cache_dir", "tokenizers"]}
#: takes minutes; tests/networks/test_lora_diffusers.py runs it with fewer steps
SLOW = "networks/lora_diffusers.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that the page names."""
    place = tmp_path_factory.mktemp("page")
    sd = Checkpoint(make_tiny_sd(place / "model.safetensors"), "sd", merge_lora)
    xl = Checkpoint(make_tiny_sdxl(place / "sdxl.safetensors"), "sdxl", sdxl_merge_lora)
    make_tiny_sd(place / "model_folder", layout="diffusers")
    for name, std in (("a", 0), ("b", 1)):
        make(sd, place / f"{name}.safetensors", seed=std, conv_dim="2")
    make(xl, place / "xl.safetensors", module=lora)
    for tool, model, file, tuned in (
        (merge_lora, "model", "a", "tuned"),
        (sdxl_merge_lora, "sdxl", "xl", "tuned_xl"),
    ):
        files = {"sd_model": place / f"{model}.safetensors", "models": place / f"{file}.safetensors"}
        run_tool(tool, **files, save_to=place / f"{tuned}.safetensors")
    return place


def test_the_page_has_commands_of_every_script() -> None:
    assert len(COMMANDS) > 20 and len({words[0] for words in COMMANDS}) >= 12


def test_every_command_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for script, *words in COMMANDS:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        args = module.setup_parser().parse_args([*words, *TINY.get(script, [])])
        if script != SLOW:
            assert module.main(args) in (None, 0), (script, words)
        for flag in ("save_to", "output"):
            if script != SLOW and (target := getattr(args, flag, None)):
                assert Path(target).exists(), target
