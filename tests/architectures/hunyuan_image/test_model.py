"""The transformer computes what diffusers' own code computes on the same weights, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.architectures.hunyuan_image.model import HunyuanImage
from library.architectures.hunyuan_image.sizes import HunyuanSizes, infer_sizes

SIZES = HunyuanSizes(hidden=64, head=16, mlp=256, double_blocks=2, single_blocks=2, channels=8, context=32, glyphs=24)
#: caption tokens, tokens of quoted text
MASKS = {
    "ragged": ([[1] * 4 + [0] * 3, [1] * 7], [[1] * 3 + [0] * 2, [0] * 5]),
    "full": ([[1] * 7, [1] * 7], [[1] * 5, [1] * 5]),
    "no quotes": ([[1] * 7, [1] * 7], [[0] * 5, [0] * 5]),
}
#: published layer -> diffusers' layers, in the order of its rows
BLOCKS = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_q_norm": ("attn.norm_q",),
    "img_attn_k_norm": ("attn.norm_k",),
    "txt_attn_q_norm": ("attn.norm_added_q",),
    "txt_attn_k_norm": ("attn.norm_added_k",),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
    "img_mod.linear": ("norm1.linear",),
    "txt_mod.linear": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "q_norm": ("attn.norm_q",),
    "k_norm": ("attn.norm_k",),
    "modulation.linear": ("norm.linear",),
}
REFINER = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
OUTER = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
LISTS = (
    ("double_blocks", "transformer_blocks", BLOCKS),
    ("single_blocks", "single_transformer_blocks", SINGLE),
    ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", REFINER),
)


def to_diffusers(state: dict[str, Tensor], sizes: HunyuanSizes = SIZES) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer in OUTER:
            if layer == "final_layer.adaLN_modulation.1":
                tensor = torch.cat(tensor.chunk(2)[::-1])  # (shift, scale), in diffusers (scale, shift)
            out[f"{OUTER[layer]}.{leaf}"] = tensor
            continue
        root, other, table = next(entry for entry in LISTS if layer.startswith(entry[0]))
        number, _, inner = layer[len(root) + 1 :].partition(".")
        parts = table[inner]
        rows = [*[sizes.hidden] * 3, sizes.mlp] if len(parts) == 4 else [len(tensor) // len(parts)] * len(parts)
        for part, piece in zip(parts, tensor.split(rows), strict=True):
            out[f"{other}.{number}.{part}.{leaf}"] = piece
    return out


def ours() -> HunyuanImage:
    torch.manual_seed(0)
    model = HunyuanImage(SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def theirs(model: HunyuanImage) -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    sizes = model.sizes
    other = HunyuanImageTransformer2DModel(
        in_channels=sizes.channels, out_channels=sizes.channels, num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head, num_layers=sizes.double_blocks, num_single_layers=sizes.single_blocks,
        num_refiner_layers=sizes.refiners, text_embed_dim=sizes.context, text_embed_2_dim=sizes.glyphs,
        rope_axes_dim=(sizes.head // 2, sizes.head // 2), mlp_ratio=sizes.mlp / sizes.hidden,
    )  # fmt: skip
    other.load_state_dict(to_diffusers(model.state_dict(), sizes))
    return other


@pytest.mark.parametrize("mask", MASKS)
def test_outputs_and_gradients_equal_diffusers(mask: str) -> None:
    model = ours()
    other = theirs(model)
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 8, 4, 6), (2, 7, 32), (2, 5, 24))
    latents, context, glyphs = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    text_mask, glyphs_mask = (torch.tensor(rows) for rows in MASKS[mask])
    times = torch.tensor([200.0, 900.0])
    found = model(latents, times, context, text_mask, glyphs, glyphs_mask)
    expected = other(
        latents, times, context, text_mask, timestep_r=None, encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=glyphs_mask, return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    leaves = (latents, context) if mask == "no quotes" else (latents, context, glyphs)
    pairs = [torch.autograd.grad(out.square().mean(), leaves) for out in (found, expected)]
    for mine, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_nothing() -> None:
    model = ours()
    latents = torch.randn(1, 8, 2, 2, requires_grad=True)
    rest = (torch.tensor([500.0]), torch.randn(1, 3, 32), torch.ones(1, 3), torch.randn(1, 2, 24), torch.zeros(1, 2))
    plain = torch.autograd.grad(model(latents, *rest).sum(), latents)[0]
    model.enable_gradient_checkpointing()
    assert torch.equal(torch.autograd.grad(model(latents, *rest).sum(), latents)[0], plain)


def test_sizes_are_inferred_and_the_published_names_complete() -> None:
    assert infer_sizes({name: tuple(tensor.shape) for name, tensor in ours().state_dict().items()}) == SIZES
    with torch.device("meta"):
        full = HunyuanImage(HunyuanSizes())
    state = full.state_dict()
    assert len(state) == 856 and sum(tensor.numel() for tensor in state.values()) == 17_425_795_520
