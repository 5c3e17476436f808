"""The transformer computes what diffusers' own code computes on the same weights, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.architectures.common.joined_layout import join
from library.architectures.lumina.model import NextDiT, pack, unpack
from library.architectures.lumina.names import diffusers_plan
from library.architectures.lumina.sizes import NextDiTSizes, infer_sizes

SIZES = NextDiTSizes(hidden=96, head=24, heads=4, kv_heads=2, mlp=512, layers=3, refiners=2, caption=32, condition=96)
#: captions of different lengths; of one length; none of them filling the batch
MASKS = {
    "ragged": [[1] * 4 + [0] * 3, [1] * 7],
    "full": [[1] * 7, [1] * 7],
    "short": [[1] * 4 + [0] * 3, [1] * 5 + [0] * 2],
}


def ours() -> NextDiT:
    torch.manual_seed(0)
    model = NextDiT(SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def theirs() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        hidden_size=96, num_layers=3, num_refiner_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=256,
        axes_dim_rope=(8, 8, 8), cap_feat_dim=32,
    )  # fmt: skip


def both() -> tuple[NextDiT, nn.Module]:
    """diffusers' random weights in both, read through the table of names."""
    torch.manual_seed(0)
    other = theirs()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = other.state_dict()
    plan = diffusers_plan({name: tuple(tensor.shape) for name, tensor in state.items()})
    model = ours()
    missing, unexpected = model.load_state_dict({name: join(plan, name, state.get) for name in plan}, strict=False)
    assert missing == ["norm_final.weight"] and not unexpected, "nothing uses that norm, and diffusers drops it"
    return model, other


@pytest.mark.parametrize("mask", MASKS)
def test_outputs_and_gradients_equal_diffusers(mask: str) -> None:
    model, other = both()
    generator = torch.Generator().manual_seed(1)
    latents, context = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((2, 16, 8, 12), (2, 7, 32))
    )
    times, text_mask = torch.tensor([0.2, 0.9]), torch.tensor(MASKS[mask])
    found = model(latents, times, context, text_mask)
    expected = other(latents, times, context, text_mask.bool(), return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pairs = [torch.autograd.grad(out.square().mean(), (latents, context)) for out in (found, expected)]
    for mine, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-7)


def test_checkpointing_changes_nothing() -> None:
    model = ours()
    latents = torch.randn(1, 16, 4, 4, requires_grad=True)
    rest: tuple[Tensor, ...] = (torch.tensor([0.5]), torch.randn(1, 3, 32), torch.tensor([[1, 1, 0]]))
    plain = torch.autograd.grad(model(latents, *rest).sum(), latents)[0]
    model.enable_gradient_checkpointing()
    assert torch.equal(torch.autograd.grad(model(latents, *rest).sum(), latents)[0], plain)


def test_sizes_are_inferred_and_the_published_names_complete() -> None:
    assert infer_sizes({name: tuple(tensor.shape) for name, tensor in ours().state_dict().items()}) == SIZES
    with torch.device("meta"):
        full = NextDiT(NextDiTSizes())
    state = full.state_dict()
    assert len(state) == 400 and sum(tensor.numel() for tensor in state.values()) == 2_609_771_456


def test_packing_is_undone() -> None:
    latents = torch.randn(2, 16, 4, 6)
    assert torch.equal(unpack(pack(latents), 2, 3), latents)
