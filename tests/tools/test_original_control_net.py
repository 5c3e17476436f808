"""ControlNets converted between their layouts: there and back are the same numbers, and diffusers loads the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import nn

from library.architectures.common.latent_diffusion import LatentDiffusion
from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from tests.fixtures.control import random_controlnet, save_difference, save_original
from tests.fixtures.file_tools import refused, run_words
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tools import original_control_net as tool

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A checkpoint and its U-Net."""
    folder = tmp_path_factory.mktemp(request.param)
    family: LatentDiffusion = SD if request.param == "sd" else SDXL
    made = (make_tiny_sd if family is SD else make_tiny_sdxl)(folder / "model.safetensors")
    cache = str(made.tokenizer_cache_dir)
    found = family.inspect(str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=cache)
    return made.path, family.load_denoiser(found, dtype=torch.float32, device="cpu")


def test_there_and_back(model: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, unet = model
    controlnet = random_controlnet(unet)
    source = save_original(controlnet, tmp_path / "source.safetensors", prefix="control_model.")
    run_words(tool, source, "--model", path, "--save_to", tmp_path / "folder")
    loaded = ControlNetModel.from_pretrained(tmp_path / "folder")
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    run_words(tool, tmp_path / "folder", "--model", path, "--save_to", tmp_path / "back.safetensors")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    names = ("--names", "diffusers", "--precision", "fp16")
    run_words(tool, source, "--model", path, "--save_to", tmp_path / "file.safetensors", *names)
    halves = load_file(tmp_path / "file.safetensors")
    assert halves.keys() == controlnet.state_dict().keys() and {t.dtype for t in halves.values()} == {torch.float16}


def test_a_difference_becomes_a_whole_one(model: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, unet = model
    controlnet = random_controlnet(unet)
    source = save_difference(controlnet, unet.state_dict(), tmp_path / "difference.safetensors")
    run_words(tool, source, "--model", path, "--save_to", tmp_path / "folder")
    found = ControlNetModel.from_pretrained(tmp_path / "folder").state_dict()
    for name, tensor in controlnet.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    # what a file lacks is the model's
    kept = {name: t for name, t in load_file(source).items() if "time_embed" not in name and name != "difference"}
    save_file(kept, tmp_path / "part.safetensors")
    run_words(tool, tmp_path / "part.safetensors", "--model", path, "--save_to", tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    name = "time_embed.0.weight"
    assert torch.equal(whole[f"control_model.{name}"], load_file(path)[f"model.diffusion_model.{name}"])


def test_mistakes(model: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, unet = model
    source = save_original(random_controlnet(unet), tmp_path / "source.safetensors")
    before = source.read_bytes()
    target = tmp_path / "new.safetensors"
    assert "exists already" in refused(capsys, tool, source, "--model", path, "--save_to", source)
    assert "source.safetensors" in refused(capsys, tool, source, "--model", path, "--save_to", source, "--overwrite")
    assert "no ControlNet" in refused(capsys, tool, path, "--model", path, "--save_to", target)
    assert "--model" in refused(capsys, tool, source, "--model", source, "--save_to", target)
    assert "none" in refused(capsys, tool, tmp_path / "none.pth", "--model", path, "--save_to", target)
    assert "--save_to" in refused(capsys, tool, source, "--model", path, "--save_to", tmp_path / "new.bin")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "name a new folder" in refused(capsys, tool, source, "--model", path, "--save_to", tmp_path / "full")
    assert source.read_bytes() == before and not target.exists()
