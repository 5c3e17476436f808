"""LoRA-FA, DyLoRA and OFT have files, merging, strengths and sample images like the LoRA, on SD and SDXL."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.inference.networks import apply_networks, choose_networks
from tests.fixtures.adapted import randomize, sd_outputs, sdxl_outputs

#: network args with everything that can be adapted, and an alpha at which the random weights are not bounded
KINDS = {
    "lora_fa": ({"conv_dim": "2", "conv_alpha": "1"}, 2.0),
    "dylora": ({"conv_dim": "4", "conv_alpha": "1", "unit": "2"}, 2.0),
    "oft": ({"enable_all_linear": "True", "enable_conv": "True"}, 100.0),
}


@pytest.fixture(params=["sd", "sdxl"])
def models(request):
    if request.param == "sd":
        return request.getfixturevalue("tiny_text_encoder"), request.getfixturevalue("tiny_unet")
    return request.getfixturevalue("sdxl_models")


def outputs(models):
    return sdxl_outputs(*models) if isinstance(models[0], list) else sd_outputs(*models)


def assert_same(one, other):
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def assert_close(one, other):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make_network(kind, models):
    module = importlib.import_module(f"networks.{kind}")
    args, alpha = KINDS[kind]
    return module, module.create_network(1.0, 4, alpha, None, *models, **args)


def test_a_new_network_changes_nothing_to_the_bit(kind, models):
    plain = outputs(models)
    _, network = make_network(kind, models)
    network.apply_to(*models)
    assert_same(outputs(models), plain)
    network.on_epoch_start(*models)  # training mode
    assert_same(outputs(models), plain)
    assert float(network.weight_norms().max()) == 0.0


def test_saved_loaded_rebuilt_and_drawn_with_it_is_the_same(tmp_path, kind, models):
    file = tmp_path / "a.safetensors"
    module, network = make_network(kind, models)
    plain = outputs(models)
    randomize(network, 0.05).eval()
    network.apply_to(*models)
    expected = outputs(models)
    assert (expected["prediction"] - plain["prediction"]).abs().max() > 1e-3
    network.save_weights(file, None, {"ss_network_module": f"networks.{kind}"})
    with safe_open(file, "pt") as opened:
        assert len(opened.metadata()["sshs_model_hash"]) == 64
    assert_same(network.state_dict(), load_file(file))
    network.remove()

    _, again = make_network(kind, models)
    again.apply_to(*models)
    again.load_weights(file)
    again.eval()
    assert_same(outputs(models), expected)
    again.remove()

    rebuilt, weights = module.create_network_from_weights(1.0, str(file), None, *models, for_inference=True)
    assert not rebuilt.training and not rebuilt.get_trainable_params()
    rebuilt.apply_to(*models)
    rebuilt.load_state_dict(weights)
    assert_same(outputs(models), expected)
    rebuilt.remove()

    encoders = models[0] if isinstance(models[0], list) else [models[0]]
    (choice,) = choose_networks([f"networks.{kind}"], [str(file)], None, None)
    drawing = SimpleNamespace(text_encoders=encoders, denoiser=models[1], vae=None)
    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    (applied,) = apply_networks([choice], drawing, merge=False, **settings)
    assert_same(outputs(models), expected)
    applied.remove()
    apply_networks([choice], drawing, merge=True, **settings)
    assert_close(outputs(models), expected)


@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_merging_is_the_hook_and_is_undone_to_the_bit(kind, models, multiplier):
    plain = outputs(models)
    _, network = make_network(kind, models)
    randomize(network, 0.05).eval()
    network.set_multiplier(multiplier)
    network.apply_to(*models)
    hooked = outputs(models)
    network.merge()
    assert_close(outputs(models), hooked)
    network.unmerge()
    assert_same(outputs(models), hooked)
    network.remove()
    assert_same(outputs(models), plain)


def test_two_on_one_model_add_up_as_merged_ones_do(kind, models):
    networks = [make_network(kind, models)[1] for _ in range(2)]
    for network in networks:
        randomize(network, 0.05).eval()
        network.apply_to(*models)
    hooked = outputs(models)
    for network in networks:
        network.merge()
    assert_close(outputs(models), hooked)


def test_files_merged_together_change_what_they_change_applied_together(tmp_path, models):
    """DoRA and OFT change each weight as it was, not as the file before left it; strengths and order do not matter."""
    names, files = ("networks.lora", "networks.oft", "networks.lora"), []
    for number, name in enumerate(names):
        args = {"dora": "True"} if name == "networks.lora" else {"enable_all_linear": "True"}
        network = importlib.import_module(name).create_network(1.0, 4, 4.0 + 96 * number, None, *models, **args)
        files.append(str(tmp_path / f"{number}.safetensors"))
        randomize(network, 0.05).save_weights(files[-1], None, {})
    encoders = models[0] if isinstance(models[0], list) else [models[0]]
    drawing = SimpleNamespace(text_encoders=encoders, denoiser=models[1], vae=None)
    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    choices = choose_networks(names, files, [1.0, 0.7, 0.4], None)
    applied = apply_networks(choices, drawing, merge=False, **settings)
    expected = outputs(models)
    for network in reversed(applied):
        network.remove()
    assert apply_networks(choices, drawing, merge=True, **settings) == []
    assert_close(outputs(models), expected)


def test_the_module_may_be_left_out_in_training(kind, tiny_unet, tiny_text_encoder):
    module = importlib.import_module(f"networks.{kind}")
    models = tiny_text_encoder, tiny_unet
    plain = outputs(models)
    network = module.create_network(1.0, 4, 100.0, None, *models, module_dropout="0.999999")
    randomize(network).apply_to(*models)
    network.train()
    assert_same(outputs(models), plain)
    network.eval()
    assert (outputs(models)["prediction"] - plain["prediction"]).abs().max() > 1e-3


def test_rates_by_part_block_and_pattern(kind, tiny_unet, tiny_text_encoder):
    module = importlib.import_module(f"networks.{kind}")
    args = {"mid_lr_weight": "0.5", "network_reg_lrs": "to_q=5e-3"}
    network = module.create_network(1.0, 4, 0.01, None, tiny_text_encoder, tiny_unet, **args)
    network.apply_to(tiny_text_encoder, tiny_unet)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, 1e-3)
    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert rates["unet_block12"] == 0.5e-4 and rates["unet_reg0"] == 5e-3
    assert ("textencoder" in rates) == (kind != "oft")
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in network.get_trainable_params()}


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        ("lora_fa", {"loraplus_lr_ratio": "16"}, "loraplus_lr_ratio: networks.lora_fa cannot do it: only the up half"),
        ("lora_fa", {"dora": "True"}, "dora: networks.lora_fa cannot do it"),
        ("dylora", {"rs_lora": "True"}, "rs_lora: networks.dylora cannot do it: its strength"),
        ("dylora", {"rank_dropout": "0.1"}, "rank_dropout: networks.dylora cannot do it: it leaves ranks out"),
        ("dylora", {"network_reg_dims": "mid=2"}, "network_reg_dims: networks.dylora cannot do it"),
        ("dylora", {"unit": "0"}, "unit=.0.: must be at least 1"),
        ("dylora", {"unti": "2"}, 'no option "unti" .did you mean "unit"'),
        ("oft", {"conv_dim": "4"}, "conv_dim: networks.oft cannot do it: convolutions are adapted with enable_conv"),
        ("oft", {"enable_conv": "ja"}, "enable_conv=.ja.: must be true or false"),
        ("oft", {"dropout": "0.1"}, "dropout: networks.oft cannot do it: an OFT has no activation"),
        ("oft", {"enable_cnv": "True"}, 'did you mean "enable_conv"'),
    ],
)
def test_what_it_cannot_do_is_said(kind, args, said):
    module = importlib.import_module(f"networks.{kind}")
    with pytest.raises(UserError, match=said):
        module.check_network_args(args)


@pytest.mark.parametrize("kind", ["dylora", "oft", "lora"])
def test_files_of_another_kind_are_named(tmp_path, kind, tiny_unet, tiny_text_encoder):
    """LoRA, LoRA-FA and DyLoRA read each other's files; an OFT is another thing."""
    models = tiny_text_encoder, tiny_unet
    other = importlib.import_module("networks.lora_fa" if kind == "oft" else "networks.oft")
    other.create_network(1.0, 4, 1e-3, None, *models).save_weights(tmp_path / "a.safetensors", None, {})
    module = importlib.import_module(f"networks.{kind}")
    said = "it is a LoRA; use networks.lora" if kind == "oft" else "it is an OFT; use the network module .*networks.oft"
    with pytest.raises(UserError, match=said):
        module.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, *models)
