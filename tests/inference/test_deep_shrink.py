"""Deep Shrink: equal to a U-Net that is written out, at the steps and depths that are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference import denoise
from library.inference.features.deep_shrink import DeepShrink, shrinking
from library.inference.features.guidance import Guidance
from library.inference.generate import begin, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.fixtures.tiny_sdxl import make_tiny_sdxl


def resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(features, size, mode="bicubic", align_corners=False)


def written_out(unet: nn.Module, x: Tensor, t: Tensor, context: Tensor, depth: int, ratio: float) -> Tensor:
    """The U-Net's parts, called one by one."""
    time = unet.time_embedding(unet.time_proj(t))
    h = unet.conv_in(x)
    skips = [h]
    for number, block in enumerate(unet.down_blocks):
        if number == depth:
            h = resized(h, (int(h.shape[-2] * ratio), int(h.shape[-1] * ratio)))
        for index, resnet in enumerate(block.resnets):
            h = resnet(h, time)
            if hasattr(block, "attentions"):
                h = block.attentions[index](h, encoder_hidden_states=context, return_dict=False)[0]
            skips.append(h)
        for downsampler in block.downsamplers or ():
            h = downsampler(h)
            skips.append(h)
    h = unet.mid_block(h, time, encoder_hidden_states=context)
    for block in unet.up_blocks:
        for index, resnet in enumerate(block.resnets):
            skip = skips.pop()
            h = h if h.shape[-2:] == skip.shape[-2:] else resized(h, skip.shape[-2:])
            h = resnet(torch.cat([h, skip], dim=1), time)
            if hasattr(block, "attentions"):
                h = block.attentions[index](h, encoder_hidden_states=context, return_dict=False)[0]
        for upsampler in block.upsamplers or ():
            h = upsampler(h)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


@torch.inference_mode()
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 1.0])
def test_the_unet_written_out(models: ImageModels, depth: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 16, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    t = torch.tensor([700, 700])
    unet = models.denoiser
    assert len(SD.shrink_points(unet)) == 2
    plain = unet(x, t, context, return_dict=False)[0]
    with shrinking(unet, SD.shrink_points(unet)[depth], ratio):
        found = unet(x, t, context, return_dict=False)[0]
    torch.testing.assert_close(found, written_out(unet, x, t, context, depth, ratio), atol=1e-5, rtol=1e-4)
    difference = (found - plain).abs().max()
    assert difference < 1e-5 if ratio == 1.0 else difference > 1e-3
    assert torch.equal(unet(x, t, context, return_dict=False)[0], plain), "nothing stays behind"


def test_steps_and_depths(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    """Before the first block until its timestep, then before the second until its own."""
    sizes: list[int] = []
    for block in models.denoiser.down_blocks:
        block.resnets[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    asked = {"ds_depth_1": 1, "ds_timesteps_1": 600, "ds_depth_2": 0, "ds_timesteps_2": 200, "ds_ratio": 0.5}
    generate_latents(models, [replace(settings, steps=4, own=asked)], options, features=[DeepShrink()])
    # timesteps 751, 501, 251, 1; the inputs of both blocks
    assert sizes == [8, 2, 4, 2, 4, 2, 8, 4]
    sizes.clear()
    generate_latents(models, [replace(settings, steps=4, own={"ds_depth_1": 1})], options, features=[DeepShrink()])
    assert sizes == [8, 2, 8, 4, 8, 4, 8, 4], "until 650, by a half, if nothing else is said"


def test_depths_that_are_not_there(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    with pytest.raises(UserError, match="Deep Shrink: depth 3: this model has depths 0 to 1"):
        generate_latents(models, [replace(settings, own={"ds_ratio": 0.5})], options, features=[DeepShrink()])


def test_sdxl_numbers_its_input_blocks(tmp_path: Path, options: GenerateOptions, settings: ImageSettings) -> None:
    made = make_tiny_sdxl(tmp_path / "model.safetensors")
    checkpoint = SDXL.inspect(
        str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir)
    )
    models = ImageModels(
        architecture=SDXL,
        tokenizers=SDXL.load_tokenizers(checkpoint),
        text_encoders=SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu"),
        denoiser=SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"),
    )
    points = SDXL.shrink_points(models.denoiser)
    assert points[0] is models.denoiser.conv_in and points[1] is models.denoiser.down_blocks[0].resnets[0]
    plain = generate_latents(models, [settings], options)
    for depth in range(len(points)):
        asked = replace(settings, own={"ds_depth_1": depth, "ds_timesteps_1": 0})
        shrunk = generate_latents(models, [asked], options, features=[DeepShrink()])
        assert shrunk.shape == plain.shape and (shrunk - plain).abs().max() > 1e-4, depth


@torch.inference_mode()
def test_inside_and_outside_of_guidance(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    asked = replace(settings, own={"ds_depth_1": 0})
    inside = denoise.run(begin(models, [asked], options, {}), [Guidance(), DeepShrink()])
    outside = denoise.run(begin(models, [asked], options, {}), [DeepShrink(), Guidance()])
    torch.testing.assert_close(inside, outside)
