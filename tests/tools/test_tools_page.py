"""The commands of docs/tools.md, run as they stand; and its table names every script."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.architectures.sd import SD
from tests.fixtures.control import random_controlnet, save_original
from tests.fixtures.file_tools import saved
from tests.fixtures.pages import commands_of
from tests.fixtures.runs import ROOT
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_yunet import write_tiny_yunet

pytestmark = pytest.mark.usefixtures("own_root_logger")

PAGE = ROOT / "docs" / "tools.md"
#: what takes long in commands, and what is tried instead
LONG = {"40000": "1"}
#: scripts for working on this project, not with it
OWN = {"check_code.py", "environment.py", "pin_requirements.py"}


def test_the_page_names_every_tool() -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = {path.name for path in (ROOT / "tools").glob("*.py")} - OWN
    assert not [name for name in missing if f"tools/{name}" not in text]


def test_every_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 60, (640, 800, 3), dtype=np.uint8)
    pixels[:] = 0
    pixels[320:352, 320:352, 0] = 255
    Image.fromarray(pixels).save("images/one.png")
    Image.fromarray(pixels).save("photo.png")
    Path("images/one.txt").write_text("a face")
    made = make_tiny_sd(Path("model.safetensors"))
    found = SD.inspect(
        str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir)
    )
    unet = SD.load_denoiser(found, dtype=torch.float32, device="cpu")
    save_original(random_controlnet(unet), Path("control.safetensors"))
    name = "lora_unet_blocks_0_self_attn_q_proj"
    lora = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    saved(Path("anima_lora.safetensors"), lora)
    write_tiny_yunet(Path("face_detection_yunet_2023mar.onnx"))
    Path("examples").symlink_to(ROOT / "examples")
    for command in commands_of(PAGE):
        module = importlib.import_module(command.script.removesuffix(".py").replace("/", "."))
        words = [LONG.get(word, word) for word in command.words]
        more = ["--width", "4", "--validation_split", "0", "--overwrite"] if "40000" in command.words else []
        assert not module.main(module.setup_parser().parse_args([*words, *more]))
    assert len(list(Path("large").iterdir())) == 10
    assert {path.name for path in Path("resized").iterdir()} == {
        *(f"one+{size}.{ending}" for size in ("512x512", "256x256") for ending in ("jpg", "txt")), "one.txt",
    }  # fmt: skip
    assert load_file("anima_again.safetensors").keys() == load_file("anima_lora.safetensors").keys()
    assert Path("original.safetensors").exists() and Path("control_folder/config.json").exists()
    assert Path("edges.png").exists() and Path("edges/one.png").exists()
    sizes = {Image.open(path).size for path in Path("faces").iterdir()}
    assert sizes == {(128, 192), (512, 768)}
