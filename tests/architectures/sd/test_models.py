"""The loaded models compute what diffusers' own loaders' models compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.architectures.conditioning import Conditioning
from library.architectures.sd import SD
from library.architectures.sd.checkpoint import SDCheckpoint
from library.errors import UserError
from tests.fixtures.tiny_sd import Sizes, diffusers_configs, make_tiny_sd


def inspected(path: Path, *, v2: bool = False, layout: str = "ldm", **options) -> SDCheckpoint:
    made = make_tiny_sd(path, v2=v2, layout=layout, **options)
    return SD.inspect(
        str(path), v2=v2, v_parameterization=False, vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir)
    )


def random_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    return noisy, torch.tensor([3, 999]), torch.randn(2, 77, 32, generator=generator)


def predict(unet: nn.Module) -> torch.Tensor:
    noisy, timesteps, context = random_inputs()
    with torch.no_grad():
        return SD.predict(unet, noisy, timesteps, Conditioning({"context": context}))


def same_weights(one: nn.Module, other: nn.Module) -> None:
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in others)


def same_model(unet: nn.Module, other: nn.Module) -> None:
    """The same weights to the bit; what they compute may be summed in another order, as the processor likes it."""
    same_weights(unet, other)
    torch.testing.assert_close(predict(unet), predict(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v2", [False, True])
def test_single_file_equals_diffusers_own_conversion(tmp_path: Path, v2: bool) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    sizes = Sizes(v2=v2, unet_channels=(32, 64, 64), unet_layers=2)
    checkpoint = inspected(tmp_path / "model.safetensors", v2=v2, sizes=sizes)
    configs = diffusers_configs(sizes)
    tensors = load_file(checkpoint.path)
    unet = UNet2DConditionModel.from_config(configs["unet"]).eval()
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)))
    same_model(SD.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"), unet)
    vae = AutoencoderKL.from_config(configs["vae"]).eval()
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config)))
    ours = SD.load_vae(checkpoint, dtype=torch.float32, device="cpu")
    same_weights(ours, vae)


@pytest.mark.parametrize("v2", [False, True])
def test_folder_equals_diffusers_own_loading(tmp_path: Path, v2: bool) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    checkpoint = inspected(tmp_path / "folder", v2=v2, layout="diffusers")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "folder", subfolder="unet").eval()
    same_model(SD.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"), theirs)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    vae = AutoencoderKL.from_pretrained(tmp_path / "folder", subfolder="vae").eval()
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(4))
        ours = SD.load_vae(checkpoint, dtype=torch.float32, device="cpu")
        latents = SD.encode_images(ours, pixels, [torch.Generator().manual_seed(4)])
    torch.testing.assert_close(latents, expected)
    text = CLIPTextModel.from_pretrained(tmp_path / "folder" / "text_encoder").eval()
    ids = torch.randint(0, 500, (1, 77), generator=torch.Generator().manual_seed(2))
    encoder = SD.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")[0]
    with torch.no_grad():
        context = SD.encode_text([encoder], {"input_ids": ids[:, None]}, clip_skip=None)["context"]
        torch.testing.assert_close(context, text(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    same_weights(encoder, text)


def test_latents_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    checkpoint = inspected(tmp_path / "model.safetensors")
    vae = SD.load_vae(checkpoint, dtype=torch.float32, device="cpu")
    pixels = torch.rand(3, 3, 64, 32) * 2 - 1
    with torch.no_grad():
        together = SD.encode_images(vae, pixels, [torch.Generator().manual_seed(i) for i in range(3)])
        alone = SD.encode_images(vae, pixels[1:2], [torch.Generator().manual_seed(1)])
        decoded = SD.decode_latents(vae, SD.scale_latents(together))
        expected = vae.decode(together).sample.clamp(-1, 1)
    assert together.shape == (3, 4, 8, 4) and together.dtype == torch.float32
    torch.testing.assert_close(together[1:2], alone)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def test_attention_backends_agree(tmp_path: Path) -> None:
    unet = SD.load_denoiser(inspected(tmp_path / "model.safetensors", v2=True), dtype=torch.float32, device="cpu")
    results = []
    for backend in ("torch", "math"):
        SD.set_attention(unet, backend)
        results.append(predict(unet))
    names = {type(p).__name__ for p in unet.attn_processors.values()}
    assert names == {"AttnProcessor"}
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_xformers_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    unet = SD.load_denoiser(inspected(tmp_path / "model.safetensors"), dtype=torch.float32, device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match="xformers is not installed"):
        SD.set_attention(unet, "xformers")


def test_gradient_checkpointing_reaches_adapters_in_a_frozen_unet(tmp_path: Path) -> None:
    checkpoint = inspected(tmp_path / "model.safetensors")
    noisy, timesteps, context = random_inputs()
    gradients, calls = [], []
    for checkpointing in (False, True):
        unet = SD.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
        if checkpointing:
            SD.enable_gradient_checkpointing(unet, [])
        scale = nn.Parameter(torch.ones(()))
        block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
        linear = block.attn1.to_q
        frozen = linear.forward
        linear.forward = lambda x, frozen=frozen, scale=scale: frozen(x) * scale
        counted = []
        block.norm1.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        SD.predict(unet, noisy, timesteps, Conditioning({"context": context})).square().sum().backward()
        gradients.append(scale.grad)
        calls.append(len(counted))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert calls == [1, 2]


def test_lora_targets_are_in_the_models(tmp_path: Path) -> None:
    checkpoint = inspected(tmp_path / "model.safetensors")
    unet = SD.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")
    encoder = SD.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")[0]
    assert set(SD.denoiser_target.module_classes) <= {type(m).__name__ for m in unet.modules()}
    assert set(SD.text_encoder_targets[0].module_classes) <= {type(m).__name__ for m in encoder.modules()}


def test_noise_schedule_is_the_published_one() -> None:
    alphas = SD.noise_schedule(zero_terminal_snr=False).alphas_cumprod
    assert len(alphas) == 1000
    # scaled-linear betas from 0.00085 to 0.012
    assert alphas[0].item() == pytest.approx(1 - 0.00085, rel=1e-6)
    assert alphas[-1].item() == pytest.approx(0.0046602, rel=1e-3)
    assert SD.noise_schedule(zero_terminal_snr=True).alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-6)
