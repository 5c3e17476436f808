"""LoRA-FA: the down half is never trained, and lies in files and states all the same."""

from __future__ import annotations

import pytest
import torch

from networks.lora import create_network as create_lora
from networks.lora_fa import create_network


def applied(text_encoder, unet, **network_args):
    network = create_network(1.0, 4, 1.0, None, text_encoder, unet, **network_args)
    network.apply_to(text_encoder, unet)
    return network


def downs(network):
    return {name: t.clone() for name, t in network.state_dict().items() if name.endswith(".lora_down.weight")}


def test_only_the_up_half_is_trained(tiny_unet, tiny_text_encoder, unet_inputs):
    network = applied(tiny_text_encoder, tiny_unet, conv_dim="2")
    groups, names = network.prepare_optimizer_params(1e-3, 1e-2, None)
    network.prepare_grad_etc(tiny_text_encoder, tiny_unet)
    network.on_epoch_start(tiny_text_encoder, tiny_unet)
    assert names == ["textencoder", "unet"]
    before = downs(network)
    assert len(before) == len(network.adapters)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    latents, timesteps, _ = unet_inputs
    for _ in range(2):
        context = tiny_text_encoder(torch.tensor([[0, 5, 9, 1], [0, 7, 3, 1]])).last_hidden_state
        tiny_unet(latents, timesteps, context).sample.square().mean().backward()
        optimizer.step()
    assert not [name for name, tensor in downs(network).items() if not torch.equal(tensor, before[name])]
    ups = [adapter.lora_up.weight for adapter in network.adapters]
    assert all(up.abs().max() > 0 for up in ups)
    assert {id(p) for p in optimizer.state} == {id(up) for up in ups} == {id(p) for p in network.parameters()}
    assert all(adapter.lora_down.weight.grad is None for adapter in network.adapters)
    assert not any(adapter.lora_down.weight.requires_grad for adapter in network.adapters)


def test_the_inputs_of_modules_are_not_kept_for_the_backward_pass():
    """The point of the paper: D x is kept, not x."""
    from networks.lora_fa import LoraFaModule
    from networks.lora_module import LoraModule
    from networks.targets import FoundModule, RankAlpha

    kept = {}
    for kind in (LoraModule, LoraFaModule):
        module = torch.nn.Linear(64, 5).requires_grad_(False)
        kind(FoundModule("lora_unet_x", "x", module), RankAlpha(2, 1.0)).apply_to_original()
        x, shapes = torch.randn(7, 64, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: shapes.append(t.shape) or t, lambda t: t
        ):
            module(x)
        kept[kind] = x.shape in shapes
    assert kept == {LoraModule: True, LoraFaModule: False}


def test_the_frozen_half_keeps_the_variance_of_its_input():
    unet = torch.nn.Module()
    unet.block = type("Transformer2DModel", (torch.nn.Module,), {})()
    unet.block.linear = torch.nn.Linear(400, 8)
    unet.block.conv = torch.nn.Conv2d(100, 8, 1)
    torch.manual_seed(0)
    network = create_network(1.0, 300, 1.0, None, None, unet)
    for adapter, fan_in in zip(network.adapters, (400, 100), strict=True):
        down = adapter.lora_down.weight
        assert float(down.mean()) == pytest.approx(0.0, abs=0.01)
        assert float(down.var()) == pytest.approx(1 / fan_in, rel=0.03)


def test_norms_are_scaled_in_the_up_half_alone(tiny_unet):
    network = create_network(1.0, 4, 4.0, None, None, tiny_unet)
    for adapter in network.adapters:
        torch.nn.init.normal_(adapter.lora_up.weight)
    frozen, norms = downs(network), network.weight_norms()
    assert norms[0] == pytest.approx(float(network.adapters[0].get_weight().detach().norm()), rel=1e-4)
    limit = float(norms.median())
    network.apply_max_norm_regularization(limit)
    torch.testing.assert_close(network.weight_norms(), norms.clamp(max=limit))
    assert not [name for name, tensor in downs(network).items() if not torch.equal(tensor, frozen[name])]


def test_a_lora_reads_its_files_and_computes_the_same(tmp_path, tiny_unet, unet_inputs):
    network = create_network(1.0, 4, 2.0, None, None, tiny_unet, rs_lora="True")
    for adapter in network.adapters:
        torch.nn.init.normal_(adapter.lora_up.weight)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    lora = create_lora(1.0, 4, 1.0, None, None, tiny_unet)
    lora.load_weights(tmp_path / "a.safetensors")
    for one, other in zip(network.adapters, lora.adapters, strict=True):
        assert torch.equal(one.get_weight(), other.get_weight())
