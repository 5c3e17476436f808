"""The computations of a LoRA: forward, merge, dropouts, hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from networks.adapter_module import Dropouts
from networks.lora import LoraModule, create_network
from networks.lora_args import LoraArgs
from networks.targets import FoundModule, RankAlpha

CONV_ARGS = {"conv_dim": "3", "conv_alpha": "2"}


def randomize(network, seed=0):
    """Give the zero-initialised halves values, so that the network changes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def adapter_on(module, rank=4, alpha=2.0, dropouts=Dropouts()):
    adapter = LoraModule(FoundModule("lora_unet_x", "x", module), RankAlpha(rank, alpha), dropouts=dropouts)
    return randomize(adapter)


def unet_output(unet, inputs):
    latents, timesteps, context = inputs
    with torch.no_grad():
        return unet(latents, timesteps, context).sample


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(6, 5), torch.randn(2, 3, 6)),
        (nn.Conv2d(6, 5, 1), torch.randn(2, 6, 4, 4)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), torch.randn(2, 6, 4, 4)),
        (nn.Conv2d(6, 5, 3, padding=2, dilation=2), torch.randn(2, 6, 4, 4)),
    ],
)
def test_forward_is_the_original_plus_the_scaled_low_rank_product(module, x):
    adapter = adapter_on(module)
    adapter.multiplier = 0.5
    weight = module.weight + 0.5 * (2.0 / 4) * torch.einsum(
        "or,r...->o...", adapter.lora_up.weight.flatten(1), adapter.lora_down.weight
    )
    if isinstance(module, nn.Conv2d):
        expected = nn.functional.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation)
    else:
        expected = nn.functional.linear(x, weight, module.bias)
    adapter.apply_to_original()
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_a_new_network_changes_nothing(tiny_unet, tiny_text_encoder, unet_inputs):
    before = unet_output(tiny_unet, unet_inputs)
    network = create_network(1.0, 4, 1.0, None, tiny_text_encoder, tiny_unet, **CONV_ARGS)
    network.apply_to(tiny_text_encoder, tiny_unet)
    assert torch.equal(unet_output(tiny_unet, unet_inputs), before)
    down = network.unet_loras[0].lora_down.weight
    assert down.abs().max() <= down.shape[1] ** -0.5  # kaiming_uniform(a=sqrt 5): bound 1/sqrt(fan in)
    assert down.std() > 0


def test_conv_rank_is_for_spatial_kernels_only(tiny_unet):
    network = create_network(1.0, 4, 1.0, None, None, tiny_unet, **CONV_ARGS)
    ranks = {adapter.lora_name: adapter.rank for adapter in network.unet_loras}
    assert ranks["lora_unet_down_blocks_0_resnets_0_conv1"] == 3
    assert ranks["lora_unet_down_blocks_0_downsamplers_0_conv"] == 3
    assert ranks["lora_unet_down_blocks_0_resnets_0_time_emb_proj"] == 4
    assert ranks["lora_unet_down_blocks_1_resnets_0_conv_shortcut"] == 4
    assert ranks["lora_unet_down_blocks_0_attentions_0_proj_in"] == 4


def test_options_of_one_network_do_not_reach_the_next(tiny_unet):
    plain = set(create_network(1.0, 4, 1.0, None, None, tiny_unet).state_dict())
    with_conv = set(create_network(1.0, 4, 1.0, None, None, tiny_unet, **CONV_ARGS).state_dict())
    plain_again = set(create_network(1.0, 4, 1.0, None, None, tiny_unet).state_dict())
    assert plain == plain_again
    assert plain < with_conv


def test_hooked_forward_equals_merged_forward_and_unmerge_is_exact(tiny_unet, tiny_text_encoder, unet_inputs):
    originals = {name: p.clone() for name, p in tiny_unet.named_parameters()}
    network = create_network(0.7, 4, 2.0, None, tiny_text_encoder, tiny_unet, **CONV_ARGS)
    randomize(network).apply_to(tiny_text_encoder, tiny_unet)
    hooked = unet_output(tiny_unet, unet_inputs)
    network.merge()
    merged = unet_output(tiny_unet, unet_inputs)
    network.remove()
    merged_without_hooks = unet_output(tiny_unet, unet_inputs)
    network.unmerge()

    torch.testing.assert_close(merged, hooked, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged, merged_without_hooks)
    for name, parameter in tiny_unet.named_parameters():
        assert torch.equal(parameter, originals[name]), name


def test_networks_unmerge_in_any_order(tiny_unet, unet_inputs):
    before = unet_output(tiny_unet, unet_inputs)
    first, second = (randomize(create_network(1.0, 2, 1.0, None, None, tiny_unet), seed) for seed in (1, 2))
    second.merge()
    only_second = unet_output(tiny_unet, unet_inputs)
    second.unmerge()
    first.pre_calculation()
    second.pre_calculation()
    first.restore_weights()
    assert torch.equal(unet_output(tiny_unet, unet_inputs), only_second)
    second.restore_weights()
    assert torch.equal(unet_output(tiny_unet, unet_inputs), before)


def test_merge_to_adds_for_good_in_the_asked_dtype(tiny_unet, tiny_text_encoder, unet_inputs):
    network = randomize(create_network(0.5, 4, 4.0, None, tiny_text_encoder, tiny_unet))
    network.apply_to(tiny_text_encoder, tiny_unet)
    expected = unet_output(tiny_unet, unet_inputs)
    network.remove()
    fresh = create_network(0.5, 4, 4.0, None, tiny_text_encoder, tiny_unet)
    fresh.merge_to(tiny_text_encoder, tiny_unet, network.state_dict(), None, "cpu")
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), expected, atol=1e-5, rtol=1e-5)
    fresh.merge_to(tiny_text_encoder, tiny_unet, None, torch.bfloat16, "cpu")
    assert fresh.unet_loras[0].original.weight.dtype == torch.bfloat16


def test_the_networks_state_holds_nothing_of_the_models_and_removal_restores_them(tiny_unet, tiny_text_encoder):
    keys = set(tiny_unet.state_dict())
    network = create_network(1.0, 4, 1.0, None, tiny_text_encoder, tiny_unet)
    network.apply_to(tiny_text_encoder, tiny_unet)
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for key in network.state_dict())
    assert set(tiny_unet.state_dict()) == keys
    network.remove()
    assert all("forward" not in module.__dict__ for module in tiny_unet.modules())


def test_stacked_networks_add_up_and_come_off_in_reverse(tiny_unet, unet_inputs):
    before = unet_output(tiny_unet, unet_inputs)
    first, second = (randomize(create_network(1.0, 2, 1.0, None, None, tiny_unet), seed) for seed in (1, 2))
    first.apply_to(None, tiny_unet)
    only_first = unet_output(tiny_unet, unet_inputs)
    second.apply_to(None, tiny_unet)
    assert not torch.allclose(unet_output(tiny_unet, unet_inputs), only_first)
    with pytest.raises(RuntimeError, match="not the outermost"):
        first.remove()
    second.remove()
    assert torch.equal(unet_output(tiny_unet, unet_inputs), only_first)
    first.remove()
    assert torch.equal(unet_output(tiny_unet, unet_inputs), before)


def test_only_applied_parts_stay_in_the_network(tiny_unet, tiny_text_encoder):
    network = create_network(1.0, 4, 1.0, None, tiny_text_encoder, tiny_unet)
    network.apply_to(tiny_text_encoder, tiny_unet, apply_text_encoder=False)
    assert network.text_encoder_loras == []
    assert not any(key.startswith("lora_te_") for key in network.state_dict())
    assert all("forward" not in module.__dict__ for module in tiny_text_encoder.modules())


def test_multiplier_and_switch(tiny_unet, unet_inputs):
    before = unet_output(tiny_unet, unet_inputs)
    network = randomize(create_network(1.0, 4, 1.0, None, None, tiny_unet))
    network.apply_to(None, tiny_unet)
    full = unet_output(tiny_unet, unet_inputs)
    network.set_multiplier(0.0)
    torch.testing.assert_close(unet_output(tiny_unet, unet_inputs), before)
    network.set_multiplier(1.0)
    assert torch.equal(unet_output(tiny_unet, unet_inputs), full)
    network.set_enabled(False)
    assert torch.equal(unet_output(tiny_unet, unet_inputs), before)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_precision(base, own, autocast):
    module = nn.Linear(16, 16).to(base).requires_grad_(False)
    adapter = adapter_on(module).to(own)
    adapter.apply_to_original()
    x = torch.randn(3, 16, dtype=base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = module(x)
    assert out.dtype == (torch.bfloat16 if autocast else base)
    out.float().square().sum().backward()
    assert adapter.lora_down.weight.grad.dtype == own
    expected = nn.functional.linear(x.float(), module.weight.float() + adapter.get_weight(), module.bias.float())
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dropouts", [Dropouts(neuron=0.4), Dropouts(rank=0.4)])
def test_dropouts_keep_the_expected_output_and_are_off_in_eval(dropouts):
    module = nn.Linear(6, 5).requires_grad_(False)
    plain = adapter_on(module)
    x = torch.randn(1, 2, 6)
    with torch.no_grad():
        expected = plain.add_change(module(x), x)
        adapter = adapter_on(module, dropouts=dropouts)
        adapter.load_state_dict(plain.state_dict())
        adapter.apply_to_original()
        torch.manual_seed(0)
        many = module(x.expand(20000, 2, 6))
        assert many.std(dim=0).max() > 0.05
        torch.testing.assert_close(many.mean(dim=0, keepdim=True), expected, atol=0.02, rtol=0.02)
        adapter.eval()
        torch.testing.assert_close(module(x), expected)


def test_rank_dropout_drops_whole_ranks_per_sample():
    module = nn.Conv2d(2, 3, 1).requires_grad_(False)
    adapter = adapter_on(module, rank=8, dropouts=Dropouts(rank=0.5))
    hidden = torch.ones(4, 8, 5, 5)
    torch.manual_seed(0)
    dropped = adapter._drop(hidden, rank_axis=1)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped, dropped[:, :, :1, :1].expand_as(dropped))
    assert not torch.equal(dropped[0], dropped[1])


def test_module_dropout_skips_the_adapter_at_its_rate_and_is_replayed_by_checkpointing():
    module = nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(1, 6)
    original = module(x)
    adapter = adapter_on(module, dropouts=Dropouts(module=0.25))
    adapter.apply_to_original()
    torch.manual_seed(0)
    skipped = sum(torch.equal(module(x), original) for _ in range(2000))
    assert 400 < skipped < 600
    for seed in range(8):  # a recomputation with another draw would give other gradients, or raise
        torch.manual_seed(seed)
        out = checkpoint(module, x.clone().requires_grad_(), use_reentrant=False)
        was_skipped = torch.equal(out, original)
        adapter.zero_grad()
        torch.manual_seed(100 + seed)
        out.sum().backward()
        assert (adapter.lora_up.weight.grad is None) == was_skipped
    adapter.eval()
    assert not torch.equal(module(x), original)


def test_max_norm_scales_the_change_down_to_the_limit(tiny_unet):
    network = randomize(create_network(1.0, 4, 2.0, None, None, tiny_unet, **CONV_ARGS))
    before = {a.lora_name: a.get_weight().detach() for a in network.adapters}
    norms = torch.stack([weight.norm() for weight in before.values()])
    torch.testing.assert_close(network.weight_norms(), norms, atol=1e-5, rtol=1e-4)
    limit = float(norms.median())

    scaled, mean, greatest = network.apply_max_norm_regularization(limit, "cpu")

    assert int(scaled) == int((norms > limit).sum())
    assert float(greatest) == pytest.approx(limit, rel=1e-4)
    assert float(mean) == pytest.approx(float(norms.clamp(max=limit).mean()), rel=1e-4)
    for adapter in network.adapters:
        weight = before[adapter.lora_name]
        expected = weight * min(1.0, limit / float(weight.norm()))
        torch.testing.assert_close(adapter.get_weight(), expected, atol=1e-5, rtol=1e-4)


def test_max_norm_leaves_a_new_network_alone(tiny_unet):
    network = create_network(1.0, 4, 1.0, None, None, tiny_unet)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    scaled, mean, greatest = network.apply_max_norm_regularization(1.0)
    assert (int(scaled), float(mean), float(greatest)) == (0, 0.0, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_wrong_rank_and_wrong_dropout_are_refused(tiny_unet):
    with pytest.raises(UserError, match="--network_dim 0"):
        create_network(1.0, 0, 1.0, None, None, tiny_unet)
    with pytest.raises(UserError, match="--network_dropout 1.0"):
        create_network(1.0, 4, 1.0, None, None, tiny_unet, neuron_dropout=1.0)


def test_a_model_without_targets_is_refused():
    with pytest.raises(UserError, match="found nothing to adapt in Sequential"):
        create_network(1.0, 4, 1.0, None, None, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("rank", "alpha", "warned"), [(64, 1, True), (16, 1, True), (8, 1, False), (64, 32, False), (64, 0, False)]
)
def test_an_alpha_that_leaves_little_is_warned_of(
    rank: int, alpha: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    LoraArgs().check_size(rank, alpha)
    assert ("of the learned strength" in caplog.text) == warned


def test_rank_stabilized_lora_needs_no_large_alpha(caplog: pytest.LogCaptureFixture) -> None:
    LoraArgs(rs_lora=True).check_size(64, 1)
    assert not caplog.text
