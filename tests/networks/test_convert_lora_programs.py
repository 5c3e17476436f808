"""Converted files in the programs they are made for: diffusers' FLUX.1 and Chroma, and PEFT.

Stable Diffusion's and SDXL's pipelines are in test_lora_files.py and test_lora_sdxl.py.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from networks.files.convert import convert
from networks.lora import create_network
from tests.fixtures.file_tools import saved
from tests.fixtures.installed import require_peft
from tests.fixtures.layouts import table

HIDDEN, RANK, ALPHA = 32, 4, 3.0  # three quarters: not exact in half precision

#: published module -> (outputs, inputs)
BLOCKS = {
    "double_blocks_0_img_attn_qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks_0_txt_attn_qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks_0_img_attn_proj": (HIDDEN, HIDDEN),
    "double_blocks_0_txt_attn_proj": (HIDDEN, HIDDEN),
    "double_blocks_0_img_mlp_0": (4 * HIDDEN, HIDDEN),
    "double_blocks_0_txt_mlp_2": (HIDDEN, 4 * HIDDEN),
    "single_blocks_0_linear1": (7 * HIDDEN, HIDDEN),
    "single_blocks_0_linear2": (HIDDEN, 5 * HIDDEN),
    "img_in": (HIDDEN, 4),
}
ONLY_FLUX = {
    "double_blocks_0_img_mod_lin": (6 * HIDDEN, HIDDEN),
    "single_blocks_0_modulation_lin": (3 * HIDDEN, HIDDEN),
    "guidance_in_out_layer": (HIDDEN, HIDDEN),
    "final_layer_adaLN_modulation_1": (2 * HIDDEN, HIDDEN),
    "final_layer_linear": (4, HIDDEN),
}
ONLY_CHROMA = {
    "distilled_guidance_layer_layers_0_in_layer": (16, 16),
    "distilled_guidance_layer_out_proj": (HIDDEN, 16),
}

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


def by_hand(deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same changes as those of diffusers' modules, written out."""
    single = deltas["single_blocks_0_linear1"]
    image, text = deltas["double_blocks_0_img_attn_qkv"], deltas["double_blocks_0_txt_attn_qkv"]
    found = {
        f"{DOUBLE}.attn.to_q": image[:HIDDEN],
        f"{DOUBLE}.attn.to_k": image[HIDDEN : 2 * HIDDEN],
        f"{DOUBLE}.attn.to_v": image[2 * HIDDEN :],
        f"{DOUBLE}.attn.add_q_proj": text[:HIDDEN],
        f"{DOUBLE}.attn.add_k_proj": text[HIDDEN : 2 * HIDDEN],
        f"{DOUBLE}.attn.add_v_proj": text[2 * HIDDEN :],
        f"{DOUBLE}.attn.to_out.0": deltas["double_blocks_0_img_attn_proj"],
        f"{DOUBLE}.attn.to_add_out": deltas["double_blocks_0_txt_attn_proj"],
        f"{DOUBLE}.ff.net.0.proj": deltas["double_blocks_0_img_mlp_0"],
        f"{DOUBLE}.ff_context.net.2": deltas["double_blocks_0_txt_mlp_2"],
        f"{SINGLE}.attn.to_q": single[:HIDDEN],
        f"{SINGLE}.attn.to_k": single[HIDDEN : 2 * HIDDEN],
        f"{SINGLE}.attn.to_v": single[2 * HIDDEN : 3 * HIDDEN],
        f"{SINGLE}.proj_mlp": single[3 * HIDDEN :],
        f"{SINGLE}.proj_out": deltas["single_blocks_0_linear2"],
        "x_embedder": deltas["img_in"],
    }
    if "final_layer_adaLN_modulation_1" in deltas:
        shift, scale = deltas["final_layer_adaLN_modulation_1"].chunk(2)
        found |= {
            f"{DOUBLE}.norm1.linear": deltas["double_blocks_0_img_mod_lin"],
            f"{SINGLE}.norm.linear": deltas["single_blocks_0_modulation_lin"],
            "time_text_embed.guidance_embedder.linear_2": deltas["guidance_in_out_layer"],
            "norm_out.linear": torch.cat([scale, shift]),
            "proj_out": deltas["final_layer_linear"],
        }
    else:
        found |= {
            "distilled_guidance_layer.layers.0.linear_1": deltas["distilled_guidance_layer_layers_0_in_layer"],
            "distilled_guidance_layer.out_proj": deltas["distilled_guidance_layer_out_proj"],
        }
    return found


def published(modules: dict[str, tuple[int, int]], *, sparse: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a published file, and each module's change of weights."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, (outputs, inputs) in modules.items():
        parts = {"qkv": [HIDDEN] * 3, "linear1": [HIDDEN] * 3 + [4 * HIDDEN]}.get(name.rpartition("_")[2], [outputs])
        parts = parts if sparse else [outputs]
        up = torch.block_diag(*(torch.randn(rows, RANK, generator=generator) * 0.2 for rows in parts))
        down = torch.randn(up.shape[1], inputs, generator=generator) * 0.2
        tensors[f"lora_unet_{name}.lora_up.weight"] = up
        tensors[f"lora_unet_{name}.lora_down.weight"] = down
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
        deltas[name] = up @ down * (ALPHA / len(down))
    return tensors, deltas


def tiny_transformer(family: str) -> nn.Module:
    from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6), "in_channels": 4, "joint_attention_dim": 24,
    }  # fmt: skip
    if family == "flux":
        return FluxTransformer2DModel(**sizes, pooled_projection_dim=8, guidance_embeds=True).eval()
    return ChromaTransformer2DModel(
        **sizes, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
    ).eval()


def output(transformer: nn.Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(1, 6, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(18.0).reshape(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    if family == "flux":
        given |= {"pooled_projections": torch.randn(1, 8, generator=generator), "guidance": torch.tensor([3.5])}
    with torch.no_grad():
        return transformer(**given, return_dict=False)[0]


@pytest.mark.parametrize("sparse", [False, True], ids=["joint", "split_qkv"])
@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_diffusers_transformers_compute_what_the_deltas_say(tmp_path, family, sparse):
    from diffusers import ChromaPipeline, FluxPipeline

    tensors, deltas = published({**BLOCKS, **(ONLY_FLUX if family == "flux" else ONLY_CHROMA)}, sparse=sparse)
    source = saved(tmp_path / "a.safetensors", tensors)
    convert(source, tmp_path / "b.safetensors", "diffusers")
    convert(source, tmp_path / "peft", "peft")
    small = load_file(tmp_path / "b.safetensors")
    assert small[f"transformer.{SINGLE}.attn.to_q.lora_A.weight"].shape == (RANK, HIDDEN)

    plain = tiny_transformer(family)
    expected = copy.deepcopy(plain)
    with torch.no_grad():
        for name, delta in by_hand(deltas).items():
            expected.get_submodule(name).weight += delta
    wanted = output(expected, family)
    assert (wanted - output(plain, family)).abs().max() > 1e-2

    adapted = copy.deepcopy(plain)
    empty = dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer"])
    if family == "flux":
        pipeline = FluxPipeline(**empty, text_encoder_2=None, tokenizer_2=None, transformer=adapted)
    else:
        pipeline = ChromaPipeline(**empty, transformer=adapted)
    require_peft()
    pipeline.load_lora_weights(str(tmp_path / "b.safetensors"))
    torch.testing.assert_close(output(pipeline.transformer, family), wanted, rtol=1e-5, atol=1e-5)

    torch.testing.assert_close(output(with_peft(plain, tmp_path / "peft" / "transformer"), family), wanted)


@pytest.mark.parametrize("name", ["lora_flux_in_dims", "lora_chroma_t5xxl"])
def test_diffusers_names_and_widths_are_those_of_its_transformers(tmp_path, name):
    from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

    tensors = {}  # a tenth as wide as the published model, two blocks of each kind
    for key, shape in table(name).items():
        if "_te" not in key and not re.search(r"_(blocks|layers)_([2-9]|\d\d)_", key):
            tensors[key] = torch.zeros([s // 32 if s >= 32 else s for s in shape]) if shape else torch.tensor(4.0)
    convert(saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "diffusers")
    kind = ChromaTransformer2DModel if "chroma" in name else FluxTransformer2DModel
    widths = {"num_attention_heads": 2, "attention_head_dim": 48, "axes_dims_rope": (16, 16, 16), "in_channels": 2}
    options = {"joint_attention_dim": 128, **widths}
    options |= {} if "chroma" in name else {"guidance_embeds": True, "pooled_projection_dim": 24}
    with torch.device("meta"):
        model = kind(num_layers=2, num_single_layers=2, **options)
    weights = model.state_dict()
    written = load_file(tmp_path / "b.safetensors")
    modules = {key.rpartition(".lora_")[0] for key in written}
    for module in modules:
        shape = weights[module.removeprefix("transformer.") + ".weight"].shape
        up, down = written[f"{module}.lora_B.weight"], written[f"{module}.lora_A.weight"]
        if shape[1] != 256:  # frequencies of the timestep, whose number no option sets
            assert (up.shape[0], down.shape[1]) == shape, module
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n]
    assert {f"transformer.{name}" for name in linears} <= modules


def with_peft(model: nn.Module, folder) -> nn.Module:
    """A copy of the model with PEFT's adapter merged."""
    require_peft()
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload()


@pytest.mark.parametrize("dora", [{}, {"dora": "True", "dora_on_output": "True"}], ids=["lora", "dora"])
def test_peft_loads_the_folder(tmp_path, tiny_unet, unet_inputs, dora):
    # ranks and alphas of their own for convolutions
    network = create_network(1.0, 4, ALPHA, None, None, tiny_unet, conv_dim="3", conv_alpha="2", **dora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft")
    plain = copy.deepcopy(tiny_unet)
    with torch.no_grad():
        before = tiny_unet(*unet_inputs).sample
        network.apply_to(None, tiny_unet)
        ours = tiny_unet(*unet_inputs).sample
        theirs = with_peft(plain, tmp_path / "peft" / "unet")(*unet_inputs).sample
    assert (ours - before).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert {file.name for file in (tmp_path / "peft").iterdir()} == {"unet", "manifest.json"}
