"""OFT of FLUX.1 and Chroma: a rotation for each projection, files, merging, gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.architectures.flux.targets import DENOISER
from library.errors import UserError
from library.inference.networks import apply_networks, choose_networks
from networks import oft
from networks.oft_flux import check_network_args, create_network, create_network_from_weights
from networks.targets import FoundModule, RankAlpha
from networks.transformer_oft import StackedOftModule
from tests.fixtures.adapted import randomize
from tests.fixtures.adapted_flux import flux_models, flux_outputs, predict

ALL = {"enable_all_linear": "True"}
#: at which the random weights are not bounded
LOOSE = 100.0


def assert_same(one, other):
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def assert_close(one, other, tolerance=1e-5):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", ["dev", "chroma"])
@pytest.mark.parametrize("args", [{}, ALL], ids=["attention", "all"])
def test_a_network_s_life(tmp_path, kind, args):
    models = flux_models(kind)
    plain = flux_outputs(*models)
    network = create_network(1.0, 4, LOOSE, None, *models, **args)
    network.apply_to(*models)
    network.train()
    assert_same(flux_outputs(*models), plain)  # the identity at the start, to the bit

    randomize(network, 0.05).eval()
    hooked = flux_outputs(*models)
    assert (hooked["prediction"] - plain["prediction"]).abs().max() > 1e-2
    assert torch.equal(hooked["text 1"], plain["text 1"])
    for multiplier in (1.0, 0.4):
        network.set_multiplier(multiplier)
        before = flux_outputs(*models)
        network.merge()
        assert_close(flux_outputs(*models), before)
        network.unmerge()
    network.set_multiplier(1.0)
    assert_same(flux_outputs(*models), hooked)

    file = tmp_path / "a.safetensors"
    network.save_weights(file, None, {"ss_network_module": "networks.oft_flux"})
    tensors = load_file(file)
    assert_same(network.state_dict(), tensors)
    counts = {name.partition(".")[0]: 0 for name in tensors}
    for name in tensors:
        counts[name.partition(".")[0]] += ".oft_blocks." in name
    assert {n: c for n, c in counts.items() if n.endswith("_qkv")} and all(
        count == (3 if name.endswith("_qkv") else 4 if name.endswith("_linear1") else 1)
        for name, count in counts.items()
    )
    assert any(name.endswith("_linear1") for name in counts) == bool(args)
    network.remove()

    rebuilt, weights = create_network_from_weights(1.0, str(file), None, *models, for_inference=True)
    rebuilt.apply_to(*models)
    rebuilt.load_state_dict(weights)
    assert_same(flux_outputs(*models), hooked)
    rebuilt.remove()
    (choice,) = choose_networks(["networks.oft_flux"], [str(file)], None, None)
    drawing = SimpleNamespace(text_encoders=models[0], denoiser=models[1], vae=None)
    apply_networks([choice], drawing, merge=True, dtype=torch.float32, device=torch.device("cpu"))
    assert_close(flux_outputs(*models), hooked)


def make_module(alpha=LOOSE, std=0.1):
    torch.manual_seed(0)
    layer = nn.Linear(8, 40).requires_grad_(False)
    found = FoundModule("oft_unet_single_blocks_0_linear1", "single_blocks.0.linear1", layer, widths=(8, 8, 8, 16))
    return layer, randomize(StackedOftModule(found, RankAlpha(2, alpha)), std)


def test_every_projection_is_rotated_by_itself():
    layer, adapter = make_module()
    changed = (layer.weight + adapter.get_weight()).detach()
    for before, after in zip(layer.weight.split([8, 8, 8, 16]), changed.split([8, 8, 8, 16]), strict=True):
        # rows keep their inner products within a block of features: angles and norms
        for old, new in zip(before.chunk(2), after.chunk(2), strict=True):
            assert (old - new).abs().max() > 1e-2
            torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(old))
    for moved in adapter.moved():
        rotation = moved.detach() + torch.eye(moved.shape[-1])
        unit = torch.eye(moved.shape[-1]).expand_as(moved)
        torch.testing.assert_close(rotation @ rotation.transpose(1, 2), unit)
        torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(2))

    # the same as an OFT of each projection as a layer of its own
    for number, (width, rows) in enumerate(zip((8, 8, 8, 16), layer.weight.split([8, 8, 8, 16]), strict=True)):
        alone = nn.Linear(8, width).requires_grad_(False)
        alone.weight.copy_(rows)
        single = oft.OftModule(FoundModule("oft_unet_x", "x", alone), RankAlpha(2, LOOSE))
        with torch.no_grad():
            single.oft_blocks.copy_(adapter.oft_blocks[number])
        mine = adapter.get_weight().split([8, 8, 8, 16])[number]
        torch.testing.assert_close(mine, single.get_weight())


def test_alpha_bounds_each_rotation():
    _, adapter = make_module(alpha=0.01)
    norms = [float(torch.linalg.vector_norm(generator.detach())) for generator in adapter.generators()]
    assert norms == pytest.approx([0.08, 0.08, 0.08, 0.16])


@pytest.mark.parametrize("autocast", [False, True])
def test_every_rotation_learns_under_checkpointing(autocast):
    models = flux_models("dev")
    network = randomize(create_network(1.0, 4, LOOSE, None, *models, **ALL), 0.05)
    network.apply_to(*models)
    network.train()
    found = []
    for checkpointing in (False, True):
        models[1].gradient_checkpointing = checkpointing
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            predict(models[1]).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters()})
    assert len(found[0]) == sum(len(adapter.oft_blocks) for adapter in network.adapters)
    assert all(gradient.any() for gradient in found[0].values())
    assert_close(found[1], found[0], 1e-2 if autocast else 1e-5)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"enable_conv": "True"}, "enable_conv: networks.oft_flux cannot do it: FLUX.1 has no convolutions"),
        ({"down_lr_weight": "1"}, "down_lr_weight: networks.oft_flux cannot do it: it counts the blocks of a U-Net"),
        ({"enable_all_liner": "True"}, 'did you mean "enable_all_linear"'),
        ({"rank_dropout": "0.1"}, "rank_dropout: networks.oft_flux cannot do it: an OFT has no ranks"),
    ],
)
def test_wrong_network_args(args, said):
    with pytest.raises(UserError, match=said):
        check_network_args(args)


def test_what_cannot_be_is_said(tmp_path):
    models = flux_models("dev")
    with pytest.raises(UserError, match="--network_dim 5: must divide the 32 output features of oft_unet_double_blo"):
        create_network(1.0, 5, 1e-3, None, *models)
    with pytest.raises(UserError, match="networks.oft: it is not made for this model family; use .* networks.oft_flux"):
        oft.check_network_args({}, DENOISER)
    network = create_network(1.0, 4, 1e-3, None, *models)
    with pytest.raises(UserError, match="--network_train_text_encoder_only: networks.oft_flux"):
        network.apply_to(*models, True, False)
    assert "networks.oft_flux" in network.no_max_norm

    from networks import lora_flux

    lora_flux.create_network(1.0, 4, 1.0, None, *models).save_weights(tmp_path / "lora.safetensors", None, {})
    with pytest.raises(UserError, match="it is a LoRA; use networks.lora_flux"):
        create_network_from_weights(1.0, str(tmp_path / "lora.safetensors"), None, *models)
    network.save_weights(tmp_path / "oft.safetensors", None, {})
    with pytest.raises(UserError, match="it is an OFT; use the network module .*networks.oft_flux"):
        lora_flux.create_network_from_weights(1.0, str(tmp_path / "oft.safetensors"), None, *models)
    with pytest.raises(UserError, match=r"oft_blocks.0 is \[4, 8, 8\] in the file and \[2, 16, 16\].*dim_from_weights"):
        create_network(1.0, 2, 1e-3, None, *models).load_weights(tmp_path / "oft.safetensors")


def test_a_learning_rate_of_text_encoders_is_passed_over(caplog):
    """Programs write one for every network."""
    network = create_network(1.0, 4, 1e-3, None, *flux_models("dev"))
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 1e-4], 1e-4, 1e-3)
    assert {group["lr"] for group in groups} == {1e-4}
    assert caplog.messages[-1] == "--text_encoder_lr has no effect: networks.oft_flux adapts no text encoder"
