"""OFT: rotations of the outputs, bounded by alpha; the paper's formulas, and LyCORIS on the same blocks."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from library.errors import UserError
from networks.oft import OftModule, create_network, create_network_from_weights
from networks.targets import FoundModule, RankAlpha
from tests.fixtures.adapted import randomize

MODULES = [
    (lambda: nn.Linear(6, 12), (2, 3, 6)),
    (lambda: nn.Linear(6, 12, bias=False), (4, 6)),
    (lambda: nn.Conv2d(6, 12, 1), (2, 6, 4, 4)),
    (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1), (2, 6, 4, 4)),
]


def oft_on(module, alpha=100.0, blocks=3, std=0.3):
    module.requires_grad_(False)
    adapter = randomize(OftModule(FoundModule("oft_unet_x", "x", module), RankAlpha(blocks, alpha)), std)
    adapter.apply_to_original()
    return adapter


def by_hand(adapter):
    """R of the paper: (I + Q) (I - Q)^-1, in float64, block by block."""
    found = []
    for block in adapter.oft_blocks.detach().double():
        generator = block - block.T
        unit = torch.eye(len(block), dtype=torch.float64)
        found.append((unit + generator) @ torch.linalg.inv(unit - generator))
    return torch.block_diag(*found)


def output_of(module, weight, x):
    if isinstance(module, nn.Conv2d):
        return nn.functional.conv2d(x, weight, module.bias, module.stride, module.padding)
    return nn.functional.linear(x, weight, module.bias)


@pytest.mark.parametrize(("make", "shape"), MODULES)
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_the_weight_is_rotated_and_the_bias_is_not(make, shape, multiplier):
    module = make()
    adapter = oft_on(module)
    adapter.multiplier = multiplier
    weight = module.weight.detach().double()
    rotated = (by_hand(adapter).T @ weight.flatten(1)).view(weight.shape)
    wanted = weight + multiplier * (rotated - weight)
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), output_of(module, wanted.float(), x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.weight + adapter.get_weight(), wanted.float(), rtol=1e-5, atol=1e-5)


def energy(weight):
    """Hyperspherical energy of the rows: the sum of 1 / distance of their directions (section 3 of the paper)."""
    directions = torch.nn.functional.normalize(weight.flatten(1).double(), dim=1)
    return float((1 / torch.pdist(directions)).sum())


@pytest.mark.parametrize(("make", "shape"), MODULES)
def test_the_rotation_is_orthogonal_and_keeps_norms_and_energy(make, shape):
    """OFT turns the columns of W, the effects of each input: W^T W stays in every block."""
    module = make()
    adapter = oft_on(module, std=2.0)
    rotation = adapter.rotation().detach()
    unit = torch.eye(4).expand(3, 4, 4)
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, unit, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3), rtol=0, atol=1e-4)
    before = module.weight.detach().flatten(1)
    after = (module.weight + adapter.get_weight()).detach().flatten(1)
    assert (after - before).abs().max() > 0.1
    for block in range(3):
        rows = slice(4 * block, 4 * block + 4)
        torch.testing.assert_close(after[rows].T @ after[rows], before[rows].T @ before[rows], rtol=1e-4, atol=1e-5)
    assert energy(after.T) == pytest.approx(energy(before.T), rel=1e-4)
    assert energy((after + 0.1 * torch.randn(after.shape)).T) != pytest.approx(energy(before.T), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_one_is_the_identity_to_the_bit(dtype):
    module = nn.Linear(6, 12).to(dtype)
    x = torch.randn(5, 6).to(dtype)
    plain = module(x)
    adapter = oft_on(module, alpha=1e-3, std=0.0)
    assert torch.equal(module(x), plain)
    module(x).sum().backward()
    assert torch.isfinite(adapter.oft_blocks.grad).all() and adapter.oft_blocks.grad.abs().max() > 0


@pytest.mark.parametrize("alpha", [1e-3, 1e-2])
def test_alpha_bounds_the_generator(alpha):
    """|Q| <= alpha * out, however large the blocks are and whatever a step does to them."""
    module = nn.Linear(6, 12)
    adapter = oft_on(module, alpha=alpha, std=0.0)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=10.0)
    x, target = torch.randn(16, 6), torch.randn(16, 12)
    for _ in range(5):
        (module(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    blocks = adapter.oft_blocks.detach()
    assert float((blocks - blocks.transpose(1, 2)).norm()) > alpha * 12
    assert float(adapter.generator().detach().norm()) == pytest.approx(alpha * 12, rel=1e-5)
    # R - I = 2 Q (I - Q)^-1, whose norm is at most 2 |Q|
    assert float(adapter.moved().detach().norm()) <= 2 * alpha * 12
    with torch.no_grad():
        adapter.oft_blocks.mul_(1e-5)
    blocks = adapter.oft_blocks.detach()
    assert torch.equal(adapter.generator(), blocks - blocks.transpose(1, 2))


def test_gradients_are_those_of_finite_differences():
    module = nn.Linear(3, 4).double()
    for alpha in (100.0, 0.05):  # free, and at the bound
        adapter = oft_on(module, alpha=alpha, blocks=2)
        x = torch.randn(5, 3).double()
        (module(x) ** 2).sum().backward()
        gradient, step = adapter.oft_blocks.grad.clone(), 1e-3
        for place in ((0, 0, 1), (1, 1, 0)):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    adapter.oft_blocks[place] += sign * step
                    losses.append((module(x) ** 2).sum())
                    adapter.oft_blocks[place] -= sign * step
            assert float(gradient[place]) == pytest.approx(
                float(losses[0] - losses[1]) / (2 * step), rel=0.02, abs=2e-2
            )
        adapter.remove_from_original()


def test_lycoris_turns_the_same_way():
    """Its own module (``algo=diag-oft``) on the same weight and blocks: a second opinion on what these mean."""
    pytest.importorskip("lycoris")
    from lycoris.modules.diag_oft import DiagOFTModule

    module = nn.Linear(6, 12, bias=False)
    adapter = oft_on(module, blocks=4)
    other = nn.Linear(6, 12, bias=False)
    other.weight = module.weight
    theirs = DiagOFTModule("x", other, 1.0, lora_dim=4, alpha=0)
    assert theirs.oft_blocks.shape == adapter.oft_blocks.shape
    with torch.no_grad():
        theirs.oft_blocks.copy_(adapter.oft_blocks)
    merged, _ = theirs.get_merged_weight(1.0)
    torch.testing.assert_close(module.weight + adapter.get_weight(), merged, rtol=1e-4, atol=1e-5)


# ---- networks ----


def test_what_is_adapted(tiny_unet, tiny_text_encoder):
    def names(**args):
        network = create_network(1.0, 4, 1e-3, None, tiny_text_encoder, tiny_unet, **args)
        assert not network.text_encoder_loras
        return {adapter.lora_name for adapter in network.adapters}

    attention = names(enable_conv="False", enable_all_linear="0")
    assert attention and all("_attn1_to_" in name or "_attn2_to_" in name for name in attention)
    linear = names(enable_all_linear="true")
    assert {name for name in linear if "resnets" in name} == set() and any("_ff_net_0_proj" in name for name in linear)
    convs = names(enable_conv="true")
    assert any(name.endswith("_resnets_0_conv1") for name in convs) and not any("_ff_" in name for name in convs)
    assert names(enable_conv="yes", enable_all_linear="yes") == linear | convs and attention == linear & convs


def test_convolutions_and_all_linear_layers_come_back_from_files(tmp_path, sdxl_models, tiny_unet):
    for models in (sdxl_models, (None, tiny_unet)):
        for args in ({"enable_conv": "True"}, {"enable_all_linear": "True", "network_reg_dims": "_ff_=8"}):
            network = create_network(1.0, 4, 1e-3, None, *models, **args)
            network.save_weights(tmp_path / "a.safetensors", None, {})
            again, _ = create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, *models)
            assert {n: t.shape for n, t in again.state_dict().items()} == {
                n: t.shape for n, t in network.state_dict().items()
            }


def test_what_cannot_be_is_said(tmp_path, tiny_unet, tiny_text_encoder, caplog):
    def create(dim=4, alpha=1e-3, dropout=None, **args):
        return create_network(1.0, dim, alpha, None, tiny_text_encoder, tiny_unet, neuron_dropout=dropout, **args)

    with pytest.raises(UserError, match="--network_dim 5: must divide the 8 output features of oft_unet_down_blocks_0"):
        create(dim=5)
    with pytest.raises(UserError, match="--network_alpha 0: must be greater than 0"):
        create(alpha=0)
    with pytest.raises(UserError, match="--network_dropout: networks.oft cannot do it"):
        create(dropout=0.1)
    network = create()
    with pytest.raises(UserError, match="--network_train_text_encoder_only: networks.oft"):
        network.apply_to(tiny_text_encoder, tiny_unet, True, False)
    with pytest.raises(UserError, match="--scale_weight_norms: networks.oft"):
        network.apply_max_norm_regularization(1.0)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    without = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("alpha")}
    with pytest.raises(UserError, match="the given weights: oft_unet_.*alpha is missing beside oft_blocks"):
        create_network_from_weights(1.0, None, None, tiny_text_encoder, tiny_unet, weights_sd=without)
    with pytest.raises(UserError, match="oft_blocks is .* use --dim_from_weights"):
        create(dim=2).load_weights(tmp_path / "a.safetensors")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with caplog.at_level(logging.WARNING):
        create(alpha=1.0)
    assert "--network_alpha 1: hardly bounds" in caplog.text


def test_a_learning_rate_of_text_encoders_is_passed_over(tiny_text_encoder, tiny_unet, caplog):
    """Programs write one for every network."""
    network = create_network(1.0, 4, 1e-3, None, tiny_text_encoder, tiny_unet)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-4, 1e-3)
    assert {group["lr"] for group in groups} == {1e-4}
    assert caplog.messages[-1] == "--text_encoder_lr has no effect: networks.oft adapts no text encoder"
