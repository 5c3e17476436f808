"""ControlNets in all their layouts are diffusers' module with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.architectures.common.controlnet import controlnet_source, load_controlnet, mean_of, original_layout
from library.architectures.common.latent_diffusion import LatentDiffusion
from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from library.errors import UserError
from tests.fixtures.control import random_controlnet, save_difference, save_original
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

Loaded = tuple[LatentDiffusion, object, nn.Module]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(SD, make_tiny_sd(tmp_path_factory.mktemp("sd") / "model.safetensors"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(SDXL, make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model.safetensors"))


def loaded(family: LatentDiffusion, made) -> Loaded:  # type: ignore[no-untyped-def]
    cache = str(made.tokenizer_cache_dir)
    checkpoint = family.inspect(str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=cache)
    return family, checkpoint, family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")


def read_back(path: Path, checkpoint: object) -> dict[str, torch.Tensor]:
    source = controlnet_source(str(path), checkpoint.unet, flag="--control_net_models")
    return load_controlnet(source, dtype=torch.float32, device="cpu").state_dict()


@pytest.mark.parametrize("layout", ["control_model.", "", "diffusers file", "diffusers folder", "difference"])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_every_layout_is_read(model: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _, checkpoint, unet = request.getfixturevalue(model)
    controlnet, path = random_controlnet(unet), tmp_path / "control.safetensors"
    if layout == "diffusers folder":
        path = tmp_path / "folder"
        controlnet.save_pretrained(path)
    elif layout == "diffusers file":
        save_file(controlnet.state_dict(), path)
    elif layout == "difference":
        save_difference(controlnet, unet.state_dict(), path)
    else:
        save_original(controlnet, path, prefix=layout)
    found, expected = read_back(path, checkpoint), controlnet.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6 if layout == "difference" else 0, rtol=0)


def test_what_a_file_lacks_is_the_unets(sd: Loaded, tmp_path: Path) -> None:
    _, checkpoint, unet = sd
    path = save_original(random_controlnet(unet), tmp_path / "control.safetensors")
    kept = {name: t for name, t in load_file(path).items() if not name.startswith("time_embed.")}
    save_file(kept, path)
    found = read_back(path, checkpoint)
    assert torch.equal(found["time_embedding.linear_1.weight"], unet.state_dict()["time_embedding.linear_1.weight"])


def test_the_published_names_are_those_of_full_models(full_sd_unet: nn.Module) -> None:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    with torch.device("meta"):
        controlnet = ControlNetModel.from_unet(full_sd_unet, load_weights_from_unet=False)
    names = dict(original_layout(controlnet.config).write(controlnet.state_dict()))
    own = {name for name in names if not name.startswith(("time_embed.", "input_blocks.", "middle_block."))}
    expected = {f"zero_convs.{n}.0" for n in range(12)} | {"middle_block_out.0"}
    expected |= {f"input_hint_block.{n}" for n in range(0, 16, 2)}
    assert own == {f"{name}.{leaf}" for name in expected for leaf in ("weight", "bias")}
    assert names["zero_convs.4.0.weight"].shape == (640, 640, 1, 1)
    assert names["input_hint_block.14.weight"].shape == (320, 256, 3, 3)
    assert "input_blocks.11.0.out_layers.3.weight" in names
    assert "input_blocks.3.0.op.weight" in names


@pytest.fixture
def full_sd_unet() -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


@torch.inference_mode()
def test_residuals_change_the_prediction_by_their_weight(sd: Loaded) -> None:
    from library.architectures.conditioning import Conditioning

    family, _, unet = sd
    controlnet = random_controlnet(unet)
    torch.manual_seed(1)
    noisy, times, image = torch.randn(4, 4, 8, 8), torch.full((4,), 500), torch.rand(2, 3, 64, 64)
    conditioning = Conditioning({"context": torch.randn(4, 77, 32)})
    plain = family.predict(unet, noisy, times, conditioning)
    controls = {w: family.control(controlnet, noisy, times, conditioning, image, weight=w) for w in (0.0, 0.5, 1.0)}
    off, half, full = (family.predict(unet, noisy, times, conditioning, control) for control in controls.values())
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=1e-5)
    assert (full - plain).abs().max() > 0.01
    torch.testing.assert_close(controls[0.5]["mid"], controls[1.0]["mid"] / 2)
    mean = mean_of([controls[0.0], controls[1.0]])
    torch.testing.assert_close(family.predict(unet, noisy, times, conditioning, mean), half, atol=1e-5, rtol=1e-4)


def test_a_controlnet_of_another_model_is_refused(sd: Loaded, sdxl: Loaded, tmp_path: Path) -> None:
    path = save_original(random_controlnet(sdxl[2]), tmp_path / "xl.safetensors")
    with pytest.raises(UserError, match=r"--control_net_models .*xl\.safetensors: .*it is for another model"):
        read_back(path, sd[1])
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no ControlNet"):
        read_back(tmp_path / "other.safetensors", sd[1])
    with pytest.raises(UserError, match=r"--control_net_models .*none\.safetensors: no such file"):
        read_back(tmp_path / "none.safetensors", sd[1])


@pytest.mark.parametrize("layout", ["published", "control_model", "diffusers"])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_diffusers_reads_what_is_written(
    model: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its own converter and its own class give the same weights; so does our reader."""
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    family, checkpoint, unet = request.getfixturevalue(model)
    controlnet = random_controlnet(unet)
    path = tmp_path / ("net" if layout == "diffusers" else "net.safetensors")
    family.write_controlnet(path, controlnet, layout, checkpoint, dtype=None, metadata={})
    expected = controlnet.state_dict()
    if layout == "diffusers":
        found = ControlNetModel.from_pretrained(path).state_dict()
    elif model == "sdxl" and layout == "control_model":
        found = expected  # diffusers' converter does not know the original names of SDXL's size embedding
    else:
        theirs = ControlNetModel.from_config(controlnet.config)
        theirs.load_state_dict(convert_controlnet_checkpoint(load_file(path), dict(controlnet.config)))
        found = theirs.state_dict()
    ours = read_back(path, checkpoint)
    assert found.keys() == expected.keys() == ours.keys()
    assert all(
        torch.equal(found[name], tensor) and torch.equal(ours[name], tensor) for name, tensor in expected.items()
    )
