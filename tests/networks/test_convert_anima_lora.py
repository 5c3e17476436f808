"""networks/convert_anima_lora_to_comfy.py: every layer's name there and back, files, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.files.hashes import sshs_hashes
from networks import convert_anima_lora_to_comfy as tool
from tests.fixtures.file_tools import saved
from tests.fixtures.runs import metadata_of

pytestmark = pytest.mark.usefixtures("own_root_logger")

#: the published names of all layers that an adapter can be on, block numbers left out but one
_ATTENTION = [f"{kind}.{layer}" for kind in ("cross_attn", "self_attn") for layer in ("k_proj", "q_proj", "v_proj")]
_BLOCK = [
    *_ATTENTION, "cross_attn.output_proj", "self_attn.output_proj", "mlp.layer1", "mlp.layer2",
    *(f"adaln_modulation_{part}.{n}" for part in ("cross_attn", "mlp", "self_attn") for n in (1, 2)),
]  # fmt: skip
_ADAPTER = [*_ATTENTION, "cross_attn.o_proj", "self_attn.o_proj", "mlp.0", "mlp.2"]
PATHS = [
    *(f"blocks.27.{layer}" for layer in _BLOCK), *(f"llm_adapter.blocks.5.{layer}" for layer in _ADAPTER),
    "final_layer.adaln_modulation.1", "final_layer.linear", "llm_adapter.embed", "llm_adapter.out_proj",
    "t_embedder.1.linear_1", "t_embedder.1.linear_2", "x_embedder.proj.1", "t_embedding_norm",
    "blocks.0.self_attn.q_norm", "llm_adapter.blocks.0.norm_self_attn", "llm_adapter.blocks.0.norm_cross_attn",
]  # fmt: skip
TEXT = ["layers.3.self_attn.q_proj", "layers.3.mlp.gate_proj", "layers.3.post_attention_layernorm", "embed_tokens"]


@pytest.mark.parametrize("path", PATHS)
def test_layers_of_the_denoiser(path: str) -> None:
    name = f"lora_unet_{path.replace('.', '_')}.lora_down.weight"
    assert tool.comfyui_name(name) == f"diffusion_model.{path}.lora_A.weight"
    assert tool.published_name(f"diffusion_model.{path}.lora_A.weight") == name


@pytest.mark.parametrize("path", TEXT)
def test_layers_of_the_text_encoder(path: str) -> None:
    name = f"lora_te_{path.replace('.', '_')}.alpha"
    assert tool.comfyui_name(name) == f"text_encoders.qwen3_06b.transformer.model.{path}.alpha"
    assert tool.published_name(tool.comfyui_name(name)) == name


def run(*words: object) -> int:
    return tool.main(tool.setup_parser().parse_args([str(word) for word in words]))


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, there, back = (tmp_path / f"{name}.safetensors" for name in ("source", "there", "back"))
    module = "lora_unet_blocks_0_self_attn_q_proj"
    tensors = {
        f"{module}.lora_down.weight": torch.randn(2, 8),
        f"{module}.lora_up.weight": torch.randn(8, 2),
        f"{module}.alpha": torch.tensor(1.0),
        "other.weight": torch.ones(1),
    }
    saved(source, tensors, {"ss_network_dim": "2", "sshs_model_hash": "old"})
    assert run(source, there) == 0
    assert "other.weight" in capsys.readouterr().err
    assert "diffusion_model.blocks.0.self_attn.q_proj.lora_B.weight" in load_file(there)
    metadata = metadata_of(there)
    own = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == sshs_hashes(load_file(there), own)
    assert run(there, back, "--reverse") == 0
    found = load_file(back)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert run(there, back) == run(source, there, "--reverse") == 1
    assert "already has" in capsys.readouterr().err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, out = saved(tmp_path / "other.safetensors", {"a.b": torch.ones(1)}), tmp_path / "out.safetensors"
    for words in ((other, out), (other, other), (tmp_path / "none.safetensors", out)):
        with pytest.raises(SystemExit) as end:
            run(*words)
        assert end.value.code == 2 and not out.exists()
    assert "not a LoRA of Anima" in capsys.readouterr().err


def test_loras_of_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their layers identify them, and their metadata where layers have the same names."""
    out = tmp_path / "out.safetensors"
    for module, metadata in (
        ("lora_unet_layers_0_attention_qkv", {}),
        ("lora_unet_double_blocks_0_img_attn_qkv", {}),
        ("lora_unet_input_blocks_4_1_proj_in", {}),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", {}),
        ("lora_unet_final_layer_linear", {"ss_base_model_version": "lumina2"}),
    ):
        source = saved(tmp_path / "a.safetensors", {f"{module}.alpha": torch.tensor(1.0)}, metadata)
        with pytest.raises(SystemExit) as end:
            run(source, out)
        assert end.value.code == 2 and not out.exists()
        assert "not a LoRA of Anima" in capsys.readouterr().err
