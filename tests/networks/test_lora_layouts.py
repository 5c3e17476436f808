"""Names, shapes and types of adapter files equal the published tables, on the real models' configurations."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import pytest
import torch

LAYOUTS = Path(__file__).resolve().parents[1] / "compat" / "layouts"

UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
TEXT_ENCODERS = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}


@pytest.fixture(scope="module")
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
    from library.architectures.common.sources import ldm_unet_source, vae_source
    from library.architectures.common.tensor_files import TensorFile
    from library.architectures.model_info import ModelInfo
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


def table_of(name):
    return json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))


def state_of_a_new_network(kind, table, text_encoder, unet):
    module = importlib.import_module(f"networks.{kind}")
    applied = (table.get("apply_text_encoder", True), table.get("apply_unet", True))
    with torch.device("meta"):
        network = module.create_network(
            1.0, table["rank"], table["alpha"], None, text_encoder, unet, **table["network_args"]
        )
        network.apply_to(text_encoder, unet, *applied)
    try:
        return network.state_dict()
    finally:
        network.remove()


TABLES = [
    ("sd15", "lora", ""),
    ("sd15", "lora", "_conv"),
    ("sd21", "lora", ""),
    ("sd21", "lora", "_conv"),
    ("sdxl", "lora", ""),
    ("sdxl", "lora", "_conv"),
    ("sd15", "lora_fa", ""),
    ("sd15", "lora_fa", "_conv"),
    ("sd21", "lora_fa", "_conv"),
    ("sdxl", "lora_fa", ""),
    ("sdxl", "lora_fa", "_conv"),
    ("sd15", "dylora", ""),
    ("sd15", "dylora", "_conv"),
    ("sd21", "dylora", "_conv"),
    ("sdxl", "dylora", ""),
    ("sdxl", "dylora", "_conv"),
    ("sd15", "oft", ""),
    ("sd15", "oft", "_all"),
    ("sdxl", "oft", ""),
    ("sdxl", "oft", "_all"),
]
FLUX_TABLES = [
    "lora_flux_unet_only",
    "lora_flux_clip_l",
    "lora_flux_clip_l_t5xxl",
    "lora_flux_in_dims",
    "lora_flux_split_qkv",
    "oft_flux",
    "oft_flux_all_linear",
    "lora_chroma",
    "lora_chroma_t5xxl",
]


@pytest.mark.parametrize(("models", "kind", "suffix"), TABLES, indirect=["models"])
def test_names_and_shapes_equal_the_published_tables(models, kind, suffix):
    family, text_encoder, unet = models
    # both have the names and shapes of a LoRA, whose table stands for those that were not published
    published = (LAYOUTS / f"{kind}_{family}{suffix}.json.gz").is_file()
    table = table_of(f"{kind if published else 'lora'}_{family}{suffix}")
    state = state_of_a_new_network(kind, table, text_encoder, unet)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    if (kind, family, published) != ("dylora", "sdxl", True):
        assert shapes == table["keys"]
        return
    # the published one lacks 72 modules of the first text encoder, which those of the second have overwritten
    assert {name: shape for name, shape in shapes.items() if name.startswith("lora_te1_")} == {
        name: shape for name, shape in table_of("lora_sdxl")["keys"].items() if name.startswith("lora_te1_")
    }
    as_published = {name.replace("lora_te2_", "lora_te_"): s for name, s in shapes.items() if "lora_te1_" not in name}
    assert as_published == table["keys"]


@pytest.fixture(scope="module")
def flux_models():
    """Text encoders and transformers of FLUX.1 and Chroma in their published sizes, on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.architectures.common.t5 import build_t5
    from library.architectures.flux.chroma import Chroma
    from library.architectures.flux.model import Flux
    from library.architectures.flux.sizes import infer_sizes

    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS["sd15"]))
        encoders = [clip, build_t5({**t5, "feed_forward_proj": "gated-gelu"})]
        flux, chroma = (
            build(infer_sizes({name: tuple(shape) for name, shape in table_of(table)["keys"].items()}))
            for build, table in ((Flux, "flux1_dev"), (Chroma, "chroma1"))
        )
    return {"flux": (encoders, flux), "chroma": (encoders[1:], chroma)}


@pytest.mark.parametrize("name", FLUX_TABLES)
def test_names_and_shapes_of_flux_equal_the_published_tables(flux_models, name):
    table = table_of(name)
    kind, family = name.split("_")[:2]
    state = state_of_a_new_network(f"{kind}_flux", table, *flux_models[family])
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == table["keys"]


def sd3_models(checkpoint: str):
    """CLIP-L, CLIP-G, T5-XXL and the transformer in their published sizes, on the meta device."""
    from library.architectures.common.clip import build_clip_with_projection, infer_clip_config
    from library.architectures.common.t5 import build_t5, infer_t5_config
    from library.architectures.lora_target import LORA_TARGET
    from library.architectures.sd3.model import MMDiT
    from library.architectures.sd3.names import PREFIX
    from library.architectures.sd3.sizes import infer_sizes
    from library.architectures.sd3.targets import CLIP_G, CLIP_L, DENOISER, T5XXL

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        return {key: tuple(shape) for key, shape in table_of(name)["keys"].items()}

    transformer = {n.removeprefix(PREFIX): s for n, s in shapes(checkpoint).items() if n.startswith(PREFIX)}
    clips = (
        infer_clip_config(shapes(name), prefix="text_model.", activation="gelu") | {"projection_dim": width}
        for name, width in (("clip_l", 768), ("clip_g", 1280))
    )
    with torch.device("meta"):
        t5 = build_t5(infer_t5_config(shapes("t5xxl_encoder")))
        models = [*map(build_clip_with_projection, clips), t5, MMDiT(infer_sizes(transformer))]
    for model, target in zip(models, (CLIP_L, CLIP_G, T5XXL, DENOISER), strict=True):
        setattr(model, LORA_TARGET, target)
    # every published tensor is the model's, and the other way round
    assert {n: tuple(t.shape) for n, t in models[-1].state_dict().items()} == transformer
    return models[:-1], models[-1]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("sd3_medium_checkpoint", "lora_sd3_medium_clip_lg"),
        ("sd3_medium_checkpoint", "lora_sd3_medium_clip_lg_t5xxl"),
        ("sd3_medium_checkpoint", "lora_sd3_medium_emb_dims"),
        ("sd3_medium_checkpoint", "lora_sd3_medium_split_qkv"),
        ("sd35_medium_checkpoint", "lora_sd35_medium_clip_lg"),
        ("sd35_large_checkpoint", "lora_sd35_large_clip_lg"),
    ],
)
def test_names_and_shapes_of_sd3_equal_the_published_tables(checkpoint, name):
    table = table_of(name)
    state = state_of_a_new_network("lora_sd3", table, *sd3_models(checkpoint))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == table["keys"]


@pytest.mark.parametrize("name", ["lora_hunyuan_image", "lora_hunyuan_image_split_qkv"])
def test_names_and_shapes_of_hunyuan_image_equal_the_published_tables(name):
    from library.architectures.hunyuan_image.model import HunyuanImage
    from library.architectures.hunyuan_image.sizes import infer_sizes

    checkpoint = {key: tuple(shape) for key, shape in table_of("hunyuan_image_21_dit")["keys"].items()}
    with torch.device("meta"):
        transformer = HunyuanImage(infer_sizes(checkpoint))
    assert {key: tuple(tensor.shape) for key, tensor in transformer.state_dict().items()} == checkpoint
    table = table_of(name)
    state = state_of_a_new_network("lora_hunyuan_image", table, [], transformer)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {key: list(tensor.shape) for key, tensor in state.items()} == table["keys"]
