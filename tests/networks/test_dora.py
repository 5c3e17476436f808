"""DoRA: the paper's formula, merging, files, and other programs' results on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from networks.dora import DoraModule
from networks.lora import create_network, create_network_from_weights
from networks.targets import FoundModule, RankAlpha
from networks.weights import sizes_of

AXES = ["input", "output"]
MODULES = [
    (nn.Linear(6, 5), (2, 3, 6)),
    (nn.Conv2d(6, 5, 1, bias=False), (2, 6, 4, 4)),
    (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 4, 4)),
]


def randomize(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            # magnitudes near what they are, and never negative
            parameter.copy_(parameter * (1 + noise).abs() if name.endswith("dora_scale") else noise)
    return network


def dora_on(module, axis, seed=0):
    return randomize(DoraModule(FoundModule("lora_unet_x", "x", module), RankAlpha(4, 2.0, axis)), seed)


def decomposed(weight, adapter, axis):
    """Equation 5 by hand: (out, in[, kh, kw]), normalised along one feature axis."""
    up, down = adapter.lora_up.weight.flatten(1), adapter.lora_down.weight
    moved = weight + 2.0 / 4 * torch.einsum("or,r...->o...", up, down)
    rows = moved if axis == "output" else moved.transpose(0, 1)
    norms = rows.flatten(1).norm(dim=1)
    shape = [-1 if i == (0 if axis == "output" else 1) else 1 for i in range(weight.dim())]
    return moved / norms.view(shape) * adapter.dora_scale.reshape(shape)


def apply_weight(module, weight, x):
    if isinstance(module, nn.Conv2d):
        return nn.functional.conv2d(x, weight, module.bias, module.stride, module.padding)
    return nn.functional.linear(x, weight, module.bias)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("module", "shape"), MODULES)
@pytest.mark.parametrize("multiplier", [1.0, 0.3, 0.0])
def test_the_paper_s_formula(module, shape, axis, multiplier):
    module = copy.deepcopy(module)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    adapter = dora_on(module, axis)
    assert adapter.dora_scale.shape[0 if axis == "output" else 1] == (5 if axis == "output" else 6)
    assert adapter.dora_scale.dim() == module.weight.dim() and adapter.dora_scale.numel() in (5, 6)
    adapter.multiplier = multiplier
    changed = decomposed(module.weight, adapter, axis)
    expected_weight = module.weight + multiplier * (changed - module.weight)
    expected = apply_weight(module, expected_weight, x)
    torch.testing.assert_close(module.weight + adapter.get_weight(), expected_weight, atol=1e-6, rtol=1e-5)
    adapter.apply_to_original()
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    adapter.merge()
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_gradients_take_the_norms_as_constants(axis):
    """Section 4.3 of the paper: as if |V| were a number."""
    module = nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    adapter = dora_on(module, axis)
    adapter.apply_to_original()
    module(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in adapter.named_parameters()}

    adapter.zero_grad()
    moved = module.weight + adapter.low_rank_weight()
    norms = moved.norm(dim=1 if axis == "output" else 0, keepdim=True).detach()
    nn.functional.linear(x, moved / norms * adapter.dora_scale, module.bias).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)
        assert parameter.grad.abs().sum() > 0


def unet_output(unet, inputs):
    latents, timesteps, context = inputs
    with torch.no_grad():
        return unet(latents, timesteps, context).sample


def make_network(text_encoder, unet, **more):
    return create_network(1.0, 4, 2.0, None, text_encoder, unet, dora="True", conv_dim="3", conv_alpha="2", **more)


@pytest.mark.parametrize("on_output", ["False", "True"])
def test_a_network(tmp_path, tiny_unet, tiny_text_encoder, unet_inputs, on_output):
    before = unet_output(tiny_unet, unet_inputs)
    network = make_network(tiny_text_encoder, tiny_unet, dora_on_output=on_output)
    network.apply_to(tiny_text_encoder, tiny_unet)
    assert torch.equal(unet_output(tiny_unet, unet_inputs), before), "a new network changes nothing"
    randomize(network)
    hooked = unet_output(tiny_unet, unet_inputs)
    assert not torch.allclose(hooked, before, atol=1e-2)
    network.merge()
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), hooked, atol=1e-5, rtol=1e-5)
    network.unmerge()
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.remove()
    assert torch.equal(unet_output(tiny_unet, unet_inputs), before)

    tensors = load_file(tmp_path / "a.safetensors")
    name = "lora_unet_down_blocks_0_resnets_0_conv2"
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    expected = (up.shape[0], 1, 1, 1) if on_output == "True" else (1, down.shape[1], 1, 1)
    assert tensors[f"{name}.dora_scale"].shape == expected
    assert {size.dora for size in sizes_of(tensors).values()} == {"output" if on_output == "True" else "input"}

    rebuilt, weights = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, tiny_text_encoder, tiny_unet)
    rebuilt.apply_to(tiny_text_encoder, tiny_unet)
    rebuilt.load_state_dict(weights)
    rebuilt.eval()
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), hooked, atol=1e-6, rtol=1e-6)
    rebuilt.remove()
    rebuilt.merge_to(tiny_text_encoder, tiny_unet, weights, None, "cpu")
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), hooked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on_output", ["False", "True"])
def test_stacked_changes_add_up_hooked_as_merged(tiny_unet, unet_inputs, on_output):
    first = randomize(create_network(0.5, 2, 1.0, None, None, tiny_unet), 1)
    second = randomize(make_network(None, tiny_unet, dora_on_output=on_output), 2)
    first.apply_to(None, tiny_unet)
    second.apply_to(None, tiny_unet)
    hooked = unet_output(tiny_unet, unet_inputs)
    first.merge()
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), hooked, atol=1e-4, rtol=1e-4)
    second.merge()
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), hooked, atol=1e-4, rtol=1e-4)
    first.unmerge()
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), hooked, atol=1e-4, rtol=1e-4)


def test_magnitudes_train_with_the_down_half_under_lora_plus(tiny_unet):
    network = make_network(None, tiny_unet, loraplus_lr_ratio="16")
    network.apply_to(None, tiny_unet)
    (down, up), descriptions = network.prepare_optimizer_params(None, 1e-4, None)
    assert descriptions == ["unet", "unet plus"]
    assert len(down["params"]) == 2 * len(up["params"])
    assert len(down["params"]) + len(up["params"]) == len(network.get_trainable_params())


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis", AXES)
def test_mixed_precision(base, axis):
    module = nn.Linear(16, 16).to(base).requires_grad_(False)
    adapter = dora_on(module, axis)
    adapter.apply_to_original()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert adapter.dora_scale.grad.dtype == torch.float32
    expected = nn.functional.linear(x.float(), module.weight.float() + adapter.get_weight(), module.bias.float())
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.05)


def test_files_of_other_kinds_are_named(tiny_unet):
    plain = create_network(1.0, 4, 2.0, None, None, tiny_unet)
    dora = create_network(1.0, 4, 2.0, None, None, tiny_unet, dora="True")
    output = create_network(1.0, 4, 2.0, None, None, tiny_unet, dora="True", dora_on_output="True")
    with pytest.raises(UserError, match=r"a\.pt: it is a DoRA .*; give --network_args dora=True"):
        plain.load_weights_from(dora.state_dict(), "a.pt")
    with pytest.raises(UserError, match="it is not a DoRA .*; leave out"):
        dora.load_weights_from(plain.state_dict(), "a.pt")
    with pytest.raises(UserError, match="see --network_args dora_on_output"):
        dora.load_weights_from(output.state_dict(), "a.pt")
    with pytest.raises(UserError, match="dora: no effect where ranks"):
        create_network_from_weights(1.0, None, None, None, tiny_unet, weights_sd=dora.state_dict(), dora="True")


def comfy_weight(weight, scale, up, down, factor, strength):
    """Return ComfyUI's weight with magnitudes for the inputs: shape (1, in, ...) against norms over the outputs."""
    assert scale.shape[0] != weight.shape[0]
    moved = weight + factor * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    axes = [axis for axis in range(weight.dim()) if axis != 1]
    norms = moved.square().sum(dim=axes, keepdim=True).sqrt() + torch.finfo(weight.dtype).eps
    return weight + strength * (moved * (scale / norms) - weight)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_what_comfyui_computes(tiny_unet, strength):
    network = randomize(make_network(None, tiny_unet))
    for adapter in network.adapters:
        expected = comfy_weight(
            adapter.original.weight, adapter.dora_scale, adapter.lora_up.weight, adapter.lora_down.weight,
            float(adapter.alpha) / adapter.rank, strength,
        )  # fmt: skip
        found = adapter.original.weight + adapter.get_weight(strength)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_peft_gives_the_same_output_for_magnitudes_of_outputs(tmp_path, tiny_unet, unet_inputs):
    """Diffusers' own code renames the published names. Its pipelines drop ``dora_scale`` before that, see the docs."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    network = randomize(make_network(None, tiny_unet, dora_on_output="True"))
    network.save_weights(tmp_path / "a.safetensors", None, {})
    before = unet_output(tiny_unet, unet_inputs)
    network.apply_to(None, tiny_unet)
    ours = unet_output(tiny_unet, unet_inputs)
    network.remove()

    state, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(tmp_path / "a.safetensors"))
    for name, tensor in state.items():
        if "lora_magnitude_vector" in name:  # PEFT's are (out,) for linear layers and (1, out, 1, 1) for convolutions
            state[name] = tensor.flatten() if tensor.dim() == 2 else tensor.transpose(0, 1)
    tiny_unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    theirs = unet_output(tiny_unet, unet_inputs)
    assert not torch.allclose(ours, before, atol=1e-2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
