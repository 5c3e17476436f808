"""Names, shapes and types of LoRA files equal the published tables, on the real models' configurations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from networks.lora import create_network

LAYOUTS = Path(__file__).resolve().parents[1] / "compat" / "layouts"

UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
TEXT_ENCODERS = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def models(request):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if request.param == "sdxl":
        return request.param, *sdxl_models()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[request.param])
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS[request.param]))
    return request.param, text_encoder, unet


def sdxl_models():
    """Both text encoders and the U-Net on the meta device, as the family loads the published checkpoint."""
    from library.architectures.base import ModelInfo
    from library.architectures.common.sources import ldm_unet_source, vae_source
    from library.architectures.common.tensor_files import TensorFile
    from library.architectures.sdxl import SDXL
    from library.architectures.sdxl.checkpoint import SDXLCheckpoint
    from library.architectures.sdxl.weights import text_1_source, text_2_source

    keys = json.loads(gzip.decompress((LAYOUTS / "sdxl_base_checkpoint.json.gz").read_bytes()))["keys"]
    shapes = {name: tuple(shape) for name, shape in keys.items()}
    file = TensorFile(Path("sdxl.safetensors"), shapes)
    sources = (ldm_unet_source(file), (text_1_source(file), text_2_source(file)), vae_source(file))
    checkpoint = SDXLCheckpoint(ModelInfo("sdxl", "", ""), "sdxl.safetensors", *sources, (Path(), Path()))
    encoders = SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="meta")
    return encoders, SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="meta")


@pytest.mark.parametrize("suffix", ["", "_conv"])
def test_names_and_shapes_equal_the_published_tables(models, suffix):
    family, text_encoder, unet = models
    table = json.loads(gzip.decompress((LAYOUTS / f"lora_{family}{suffix}.json.gz").read_bytes()))

    with torch.device("meta"):
        network = create_network(1.0, table["rank"], table["alpha"], None, text_encoder, unet, **table["network_args"])
        network.apply_to(text_encoder, unet)
    try:
        state = network.state_dict()
    finally:
        network.remove()

    assert {name: list(tensor.shape) for name, tensor in state.items()} == table["keys"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
