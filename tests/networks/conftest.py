from __future__ import annotations

import pytest
import torch

from library.architectures.sdxl import SDXL
from tests.fixtures.tiny_sdxl import make_tiny_sdxl


@pytest.fixture
def tiny_unet():
    return make_tiny_unet()


@pytest.fixture
def tiny_text_encoder():
    return make_tiny_text_encoder()


@pytest.fixture
def unet_inputs():
    """Latents (2, 4, 8, 8), timesteps (2,), context (2, 5, 16)."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator)
    return latents, torch.tensor([10, 700]), context


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    return make_tiny_sdxl(tmp_path_factory.mktemp("xl") / "folder", layout="diffusers").path


@pytest.fixture
def sdxl_models(sdxl_folder):
    """Text encoders and U-Net of the folder, fresh for every test."""
    checkpoint = SDXL.inspect(str(sdxl_folder), v_parameterization=False, vae=None, tokenizer_cache_dir=None)
    encoders = SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    return encoders, SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="cpu")


def make_tiny_unet():
    """Two levels, one with attention; every kind of adapted module occurs."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return unet.requires_grad_(False).eval()


def make_tiny_text_encoder(width: int = 16, inner: int = 24):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).requires_grad_(False).eval()
