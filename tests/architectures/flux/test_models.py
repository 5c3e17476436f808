"""The transformers compute what diffusers' own code computes on the same weights, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from library.architectures.flux.chroma import Chroma, extend_mask
from library.architectures.flux.model import Flux, FluxTransformer
from library.architectures.flux.packing import pack_latents, unpack_latents
from library.architectures.flux.sizes import infer_sizes
from tests.architectures.flux.oracle import diffusers_model
from tests.fixtures.tiny_flux import FluxFileSizes, chroma_shapes, flux_shapes, transformer_tensors

SIZES = FluxFileSizes()
H, W, TEXT = 8, 4, 5  # latent cells, text tokens
KINDS = ("dev", "schnell", "chroma")
MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
#: the published weights of these are whole in diffusers too
WEIGHTS = {
    "img_in.weight": "x_embedder.weight",
    "txt_in.bias": "context_embedder.bias",
    "double_blocks.0.img_attn.proj.weight": "transformer_blocks.0.attn.to_out.0.weight",
    "double_blocks.1.txt_mlp.0.weight": "transformer_blocks.1.ff_context.net.0.proj.weight",
    "double_blocks.0.txt_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_added_k.weight",
    "single_blocks.1.linear2.weight": "single_transformer_blocks.1.proj_out.weight",
    "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q.weight",
}


@dataclass
class Inputs:
    latents: Tensor  # (2, 16, H, W)
    timesteps: Tensor
    context: Tensor
    pooled: Tensor
    guidance: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.latents, self.context, self.pooled

    def gradients(self) -> list[Tensor]:
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]


def tensors_of(kind: str) -> dict[str, Tensor]:
    return transformer_tensors(chroma_shapes(SIZES) if kind == "chroma" else flux_shapes(SIZES, guidance=kind == "dev"))


def ours_of(kind: str) -> FluxTransformer:
    tensors = tensors_of(kind)
    sizes = infer_sizes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model = Chroma(sizes) if kind == "chroma" else Flux(sizes)
    model.load_state_dict(tensors)
    return model


def inputs(seed: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 16, H, W), (2, TEXT, SIZES.t5_width), (2, SIZES.base.text_width))
    latents, context, pooled = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return Inputs(latents, torch.tensor([0.13, 0.97]), context, pooled, torch.tensor([3.5, 1.0]))


def run_ours(model: nn.Module, kind: str, given: Inputs, mask: Tensor | None = None, **options) -> Tensor:
    if kind == "chroma":
        mask = torch.ones(2, TEXT) if mask is None else mask
        return model(given.latents, given.timesteps, given.context, mask, **options)
    guidance = given.guidance if kind == "dev" else None
    return model(given.latents, given.timesteps, given.context, given.pooled, guidance, text_mask=mask, **options)


def run_theirs(model: nn.Module, kind: str, given: Inputs, mask: Tensor | None = None, **options) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(H // 2), torch.arange(W // 2), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    tokens = given.latents.reshape(2, 16, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, -1, 64)
    settings = {"timestep": given.timesteps, "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3), **options}
    whole = None if mask is None else torch.cat([mask.bool(), torch.ones(2, len(ids), dtype=torch.bool)], dim=1)
    if kind == "chroma":
        settings["attention_mask"] = whole
    else:
        settings |= {"pooled_projections": given.pooled, "guidance": given.guidance if kind == "dev" else None}
        if whole is not None:
            settings["joint_attention_kwargs"] = {"attention_mask": whole[:, None, None]}
    out = model(tokens, given.context, return_dict=False, **settings)[0]
    return out.reshape(2, H // 2, W // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, H, W)


def close(ours: Tensor, theirs: Tensor, **tolerance) -> None:
    torch.testing.assert_close(ours, theirs, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_diffusers(kind: str, masked: bool) -> None:
    ours, theirs = ours_of(kind), diffusers_model(tensors_of(kind), SIZES)
    mask = MASK if masked else None
    first, second = inputs(), inputs()
    prediction = run_ours(ours, kind, first, mask)
    # diffusers leaves it to its pipeline to keep one token of padding
    seen = extend_mask(MASK, 1) if masked and kind == "chroma" else mask
    expected = run_theirs(theirs, kind, second, seen)
    assert prediction.shape == (2, 16, H, W)
    close(prediction, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (prediction * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(first.gradients(), second.gradients(), strict=True):
        close(mine, other)
    assert (first.latents.grad.abs().amax(dim=(1, 2, 3)) > 0.1).all()
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name, counterpart in WEIGHTS.items():
        scale = other[counterpart].grad.abs().max().item()
        assert scale > 0
        close(mine[name].grad, other[counterpart].grad, atol=1e-5 * max(scale, 1))
    qkv = torch.cat([other[f"transformer_blocks.0.attn.to_{x}.weight"].grad for x in "qkv"])
    close(mine["double_blocks.0.img_attn.qkv.weight"].grad, qkv, atol=1e-5 * max(qkv.abs().max().item(), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_text_behind_the_mask_changes_nothing(kind: str) -> None:
    model, given = ours_of(kind), inputs()
    seen = extend_mask(MASK, 1) if kind == "chroma" else MASK.bool()
    with torch.no_grad():
        before = run_ours(model, kind, given, MASK)
        given.context[~seen] += 1
        close(run_ours(model, kind, given, MASK), before)
        given.context[0, 0] += 1
        assert (run_ours(model, kind, given, MASK)[0] - before[0]).abs().max() > 1e-3


def test_chroma_sees_as_much_padding_as_asked() -> None:
    assert extend_mask(MASK, 1).tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert extend_mask(MASK, 0).equal(MASK.bool())
    model, given = ours_of("chroma"), inputs()
    with torch.no_grad():
        one, none = (run_ours(model, "chroma", given, MASK, visible_padding=count) for count in (1, 0))
        more = run_ours(model, "chroma", given, extend_mask(MASK, 1).int(), visible_padding=0)
    assert (one - none).abs().max() > 1e-4
    close(one, more)


def test_chroma_embeds_guidance() -> None:
    model, given = ours_of("chroma"), inputs()
    with torch.no_grad():
        default = run_ours(model, "chroma", given)
        close(run_ours(model, "chroma", given, guidance=torch.zeros(2)), default)
        assert (run_ours(model, "chroma", given, guidance=torch.full((2,), 4.0)) - default).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_controlnet_residuals_are_added_as_diffusers_adds_them(kind: str) -> None:
    ours, theirs, given = ours_of(kind), diffusers_model(tensors_of(kind), SIZES), inputs()
    generator = torch.Generator().manual_seed(3)
    double = [torch.randn(2, H * W // 4, SIZES.hidden, generator=generator)]  # one for both blocks
    single = [torch.randn(2, H * W // 4, SIZES.hidden, generator=generator) for _ in range(2)]
    with torch.no_grad():
        prediction = run_ours(ours, kind, given, double_residuals=double, single_residuals=single)
        expected = run_theirs(
            theirs, kind, given, controlnet_block_samples=double, controlnet_single_block_samples=single
        )
    close(prediction, expected)


def gradients_of(kind: str, change: Callable[[FluxTransformer], object], mask: Tensor | None = None) -> list[Tensor]:
    model, given = ours_of(kind), inputs()
    change(model)
    run_ours(model, kind, given, mask).square().sum().backward()
    weights = dict(model.named_parameters())
    return [*given.gradients(), *(weights[name].grad for name in WEIGHTS)]


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    plain = gradients_of(kind, lambda model: None, MASK)
    runs = []

    def count(model: FluxTransformer) -> None:
        model.enable_gradient_checkpointing()
        for block in (*model.double_blocks, *model.single_blocks):
            block.register_forward_pre_hook(lambda *_: runs.append(1))

    for mine, other in zip(gradients_of(kind, count, MASK), plain, strict=True):
        assert torch.equal(mine, other)
    assert len(runs) == 8  # each of the four blocks twice


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_plain_attention_gives_the_same_gradients(masked: bool) -> None:
    mask = MASK if masked else None
    plain = gradients_of("dev", lambda model: None, mask)
    for mine, other in zip(gradients_of("dev", lambda model: model.set_attention("math"), mask), plain, strict=True):
        close(mine, other, atol=1e-4)


def test_blocks_compile_one_by_one_and_are_checkpointed() -> None:
    from library.memory.compiling import CompileSettings, compile_blocks

    def compiled(model: FluxTransformer) -> None:
        model.enable_gradient_checkpointing()
        settings = CompileSettings("aot_eager")
        assert compile_blocks(model, ("DoubleStreamBlock", "SingleStreamBlock"), settings) == 4

    for mine, other in zip(gradients_of("dev", compiled), gradients_of("dev", lambda model: None), strict=True):
        close(mine, other, atol=1e-4)


def test_packed_latents_and_sizes() -> None:
    model, given = ours_of("dev"), inputs()
    latents = given.latents.detach()
    assert (
        pack_latents(latents)[0, 1, 5] == latents[0, 1, 0, 3]
    )  # token 1 in row 0: columns 2, 3; channel 1, cell (0, 1)
    assert torch.equal(unpack_latents(pack_latents(latents), (H, W)), latents)
    with torch.no_grad():
        whole = run_ours(model, "dev", given)
        given.latents = pack_latents(latents)
        packed = run_ours(model, "dev", given, size=(H, W))
    close(unpack_latents(packed, (H, W)), whole)
    with pytest.raises(ValueError, match="8 packed tokens need their size"):
        run_ours(model, "dev", given, size=(H, 8))
    with pytest.raises(ValueError, match="7x4 cells cannot be cut into patches"):
        pack_latents(latents[:, :, :7])


def test_dev_needs_guidance_and_schnell_has_none() -> None:
    given = inputs()
    with pytest.raises(ValueError, match="embeds the guidance scale"):
        run_ours(ours_of("dev"), "schnell", given)
    with torch.no_grad():
        schnell = ours_of("schnell")
        assert torch.equal(run_ours(schnell, "dev", given), run_ours(schnell, "schnell", given))


@pytest.mark.parametrize("kind", ["dev", "chroma"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close(kind: str, autocast: bool) -> None:
    exact, rough, given = ours_of(kind), ours_of(kind), inputs()
    with torch.no_grad():
        expected = run_ours(exact, kind, given, MASK)
        if not autocast:
            rough.to(torch.bfloat16)
            halves = (tensor.bfloat16() for tensor in given.leaves)
            given.latents, given.context, given.pooled = halves
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = run_ours(rough, kind, given, MASK)
    assert (prediction - expected).abs().max() < 0.05 * expected.abs().max()
