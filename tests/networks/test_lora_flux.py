"""LoRA of FLUX.1 and Chroma: what is adapted, projections apart, files, merging, rates, and how gradients flow."""

from __future__ import annotations

import importlib
import logging
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.flux.targets import DENOISER
from library.architectures.sd import SD
from library.errors import UserError
from library.inference.networks import apply_networks, choose_networks
from library.training.network_module import parse_network_args
from networks import lora
from networks.lora_flux import LoraFluxNetwork, check_network_args, create_network, create_network_from_weights
from networks.oft_flux import OftFluxNetwork
from networks.split_lora import SplitLoraModule, is_block_diagonal
from networks.targets import FoundModule, RankAlpha
from networks.third_party import text_argument
from tests.fixtures.adapted import randomize
from tests.fixtures.adapted_flux import flux_models, flux_outputs, predict
from tests.fixtures.runs import ROOT

#: everything at once, for each model
ARGS = {
    "dev": {"train_t5xxl": "True", "in_dims": "[2,2,2,2,2]", "split_qkv": "True"},
    "schnell": {"img_attn_dim": "6", "single_dim": "3"},
    "chroma": {"train_t5xxl": "True", "in_dims": "2,0,0,0,2"},
    "plain": {},
}


def models_of(kind):
    return flux_models("dev" if kind == "plain" else kind)


def assert_same(one, other):
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def assert_close(one, other, tolerance=1e-5):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


def make(models, *, std=0.1, **args):
    return randomize(create_network(1.0, 4, 2.0, None, *models, **args), std)


def ranks_of(network):
    return {adapter.lora_name: adapter.rank for adapter in network.adapters}


# ---- the public story: create, train, save, load, merge ----


@pytest.mark.parametrize("kind", ARGS)
def test_a_network_s_life(tmp_path, kind):
    models = models_of(kind)
    encoders, denoiser = models
    plain = flux_outputs(*models)
    fresh = create_network(1.0, 4, 2.0, None, *models, **ARGS[kind])
    fresh.apply_to(*models)
    fresh.train()
    assert_same(flux_outputs(*models), plain)
    fresh.remove()

    network = make(models, **ARGS[kind])
    network.apply_to(*models)
    hooked = flux_outputs(*models)
    untrained = {"text 2"} if kind in ("schnell", "plain") else set()
    changed = {name for name in plain if (hooked[name] - plain[name]).abs().max() > 1e-3}
    assert changed == set(plain) - untrained
    network.merge()
    assert_close(flux_outputs(*models), hooked)
    network.unmerge()
    assert_same(flux_outputs(*models), hooked)

    file = tmp_path / "a.safetensors"
    network.save_weights(file, None, {"ss_network_module": "networks.lora_flux"})
    assert_same(network.state_dict(), load_file(file))
    network.remove()
    assert_same(flux_outputs(*models), plain)

    again = create_network(1.0, 4, 2.0, None, *models, **ARGS[kind])
    again.apply_to(*models)
    again.load_weights(file)
    assert_same(flux_outputs(*models), hooked)
    again.remove()

    rebuilt, weights = create_network_from_weights(1.0, str(file), None, *models, for_inference=True)
    assert ranks_of(rebuilt) == ranks_of(network) and not rebuilt.get_trainable_params()
    assert {type(a) for a in rebuilt.adapters} == {type(a) for a in network.adapters}
    rebuilt.apply_to(*models)
    rebuilt.load_state_dict(weights)
    assert_same(flux_outputs(*models), hooked)
    rebuilt.remove()

    (choice,) = choose_networks(["networks.lora_flux"], [str(file)], None, None)
    drawing = SimpleNamespace(text_encoders=encoders, denoiser=denoiser, vae=None)
    apply_networks([choice], drawing, merge=True, dtype=torch.float32, device=torch.device("cpu"))
    assert_close(flux_outputs(*models), hooked)


def test_a_dora_merges_as_it_computes(tmp_path):
    models = models_of("plain")
    network = make(models, dora="True")
    network.apply_to(*models)
    hooked = flux_outputs(*models)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.remove()
    for args, key in (({"split_qkv": "True"}, "split_qkv"), ({"ggpo_sigma": "1", "ggpo_beta": "0"}, "ggpo_sigma")):
        with pytest.raises(UserError, match=f"{key}: the file is a DoRA .*, which excludes it"):
            create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, *models, **args)
    rebuilt, weights = create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, *models)
    rebuilt.merge_to(*models, weights)
    assert_close(flux_outputs(*models), hooked)


# ---- what is adapted ----


def test_ranks_by_kind_of_layer():
    models = models_of("plain")
    dims = {
        "img_attn_dim": "4", "txt_attn_dim": "2", "img_mlp_dim": "8", "txt_mlp_dim": "3", "img_mod_dim": "5",
        "txt_mod_dim": "0", "single_dim": "6", "single_mod_dim": "1",
    }  # fmt: skip
    network = create_network(1.0, 16, 1.0, None, *models, in_dims="[4,0,2,1,7]", **dims)
    ranks = ranks_of(network)
    as_trained = create_network(1.0, 16, 1.0, None, text_argument(models[0]), models[1], in_dims="4,0,2,1,7", **dims)
    assert ranks_of(as_trained) == ranks
    block = {n.removeprefix("lora_unet_double_blocks_1_"): r for n, r in ranks.items() if "double_blocks_1" in n}
    assert block == {
        "img_attn_qkv": 4, "img_attn_proj": 4, "txt_attn_qkv": 2, "txt_attn_proj": 2, "img_mlp_0": 8, "img_mlp_2": 8,
        "txt_mlp_0": 3, "txt_mlp_2": 3, "img_mod_lin": 5,
    }  # fmt: skip
    single = {n.removeprefix("lora_unet_single_blocks_0_"): r for n, r in ranks.items() if "single_blocks_0" in n}
    assert single == {"linear1": 6, "linear2": 6, "modulation_lin": 1}
    inputs = {n.removeprefix("lora_unet_"): r for n, r in ranks.items() if "_in" in n and "blocks" not in n}
    assert inputs == {
        "img_in": 4, "vector_in_in_layer": 2, "vector_in_out_layer": 2, "guidance_in_in_layer": 1,
        "guidance_in_out_layer": 1, "txt_in": 7,
    }  # fmt: skip
    assert {float(adapter.alpha) for adapter in network.adapters} == {1.0}
    assert {r for n, r in ranks.items() if n.startswith("lora_te1_")} == {16}
    assert not any(n.startswith("lora_te3_") for n in ranks)


def test_blocks_that_are_trained():
    models = models_of("plain")

    def blocks(**args):
        names = ranks_of(create_network(1.0, 4, 1.0, None, *models, **args))
        return {n.split("_")[2] + n.split("_")[4] for n in names if "blocks" in n}

    assert blocks() == blocks(train_double_block_indices="all") == {"double0", "double1", "single0", "single1"}
    assert blocks(train_double_block_indices="none", train_single_block_indices="0-1") == {"single0", "single1"}
    assert blocks(train_single_block_indices="1") == {"double0", "double1", "single1"}
    # the older word for the same
    assert blocks(train_blocks="all") == blocks()
    assert blocks(train_blocks="single") == {"single0", "single1"}
    assert blocks(train_blocks="double", train_double_block_indices="1") == {"double1"}
    # patterns choose within these blocks
    network = create_network(
        1.0, 4, 1.0, None, *models, train_double_block_indices="1", network_reg_dims="double.*img_attn=9,single.*mod=0"
    )
    ranks = ranks_of(network)
    assert {n for n, rank in ranks.items() if rank == 9} == {
        "lora_unet_double_blocks_1_img_attn_qkv",
        "lora_unet_double_blocks_1_img_attn_proj",
    }
    assert not any("modulation" in name for name in ranks)


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        ("dev", {"train_double_block_indices": "0,2"}, "2 is out of range; the model has 2 double blocks, 0-1"),
        ("dev", {"train_single_block_indices": "1-38"}, "38 is out of range; the model has 2 single blocks"),
        ("dev", {"train_single_block_indices": "4-2"}, "the range .4-2. runs backwards"),
        ("dev", {"train_single_block_indices": "1;2"}, "is no number and no range; give e.g. 0,1,4-7, all or none"),
        ("dev", {"train_blocks": "middle"}, "train_blocks=.middle.: must be all, double or single"),
        (
            "dev",
            {"train_blocks": "single", "train_double_block_indices": "0"},
            "train_blocks=single and train_double_block_indices exclude each other",
        ),
        ("dev", {"in_dims": "[1,2]"}, "must have 5 comma-separated values, has 2"),
        ("schnell", {"in_dims": "[1,1,1,1,1]"}, "in_dims: the model has no guidance_in; give 0 in its place"),
        ("chroma", {"in_dims": "[1,1,0,0,1]"}, "in_dims: the model has no time_in"),
        ("chroma", {"img_mod_dim": "4"}, "img_mod_dim has no effect: the model has no such layers"),
        ("dev", {"img_atn_dim": "4"}, 'no option "img_atn_dim".*did you mean "img_attn_dim"'),
        ("dev", {"conv_dim": "4"}, "conv_dim: networks.lora_flux cannot do it: FLUX.1 has no convolutions"),
        ("dev", {"block_dims": "4"}, "block_dims: networks.lora_flux cannot do it: it counts the blocks of a U-Net"),
        ("dev", {"split_qkv": "maybe"}, "split_qkv=.maybe.: must be true or false"),
        ("dev", {"split_qkv": "True", "dora": "True"}, "split_qkv and dora=True exclude each other"),
        ("dev", {"ggpo_sigma": "0.1"}, "ggpo_sigma needs ggpo_beta beside it"),
        ("dev", {"ggpo_sigma": "-1", "ggpo_beta": "0"}, "ggpo_sigma=.-1.: must be at least 0"),
        ("dev", {"network_reg_dims": "middle=4"}, "network_reg_dims: .middle. is in none of the"),
    ],
)
def test_wrong_network_args(kind, args, said):
    with pytest.raises(UserError, match=said):
        create_network(1.0, 4, 1.0, None, *flux_models(kind), **args)


def test_ranks_of_files_are_the_file_s(tmp_path):
    models = models_of("plain")
    make(models).save_weights(tmp_path / "a.safetensors", None, {})
    with pytest.raises(UserError, match="single_dim, train_t5xxl: no effect where ranks and alphas come from a file"):
        create_network_from_weights(
            1.0, str(tmp_path / "a.safetensors"), None, *models, single_dim="4", train_t5xxl="True"
        )


def test_other_families_and_modules_are_named(tiny_unet):
    encoders, denoiser = models_of("plain")
    with pytest.raises(UserError, match="networks.lora: it is not made for this model family; use networks.lora_flux"):
        lora.check_network_args({}, DENOISER)
    denoiser.lora_target = DENOISER
    with pytest.raises(UserError, match="networks.lora: it is not made for this model family; use networks.lora_flux"):
        lora.create_network(1.0, 4, 1.0, None, encoders, denoiser)
    with pytest.raises(UserError, match="networks.lora_flux: it is not made for this model family; use networks.lora"):
        check_network_args({}, SD.denoiser_target)
    check_network_args({"single_dim": "4"})
    theirs = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 32)}
    with pytest.raises(UserError, match="names of another program .* python tools/lora.py convert .* --to kohya"):
        create_network_from_weights(1.0, None, None, encoders, denoiser, theirs)
    with pytest.raises(UserError, match="found nothing to adapt in UNet2DConditionModel"):
        create_network(1.0, 4, 1.0, None, None, tiny_unet)


def test_verbose_tells_every_rank(caplog):
    with caplog.at_level(logging.INFO, "networks.transformer_lora"):
        network = create_network(1.0, 4, 2.0, None, *models_of("plain"), verbose="True", split_qkv="True")
    lines = [record.message for record in caplog.records]
    assert len(lines) == len(network.adapters)
    assert "lora_unet_double_blocks_0_img_attn_proj: rank 4, alpha 2" in lines
    assert "lora_unet_single_blocks_0_linear1: rank 16, alpha 8" in lines


# ---- the page's commands ----


def test_commands_of_the_page():
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    commands = re.findall(r"^flux_train_network.py (--network_module networks\..*)$", page, re.MULTILINE)
    assert {command.split()[1] for command in commands} == set(DENOISER.network_modules)
    for command in commands:
        given, _, network_args = command.partition(" --network_args ")
        flags = dict(zip(given.split()[::2], given.split()[1::2], strict=True))
        module = importlib.import_module(flags["--network_module"])
        arguments = parse_network_args(shlex.split(network_args))
        module.check_network_args(arguments, DENOISER)
        if "indices" not in network_args:  # of blocks that tiny models do not have
            dim = 4 if "oft" in module.__name__ else int(flags["--network_dim"])
            module.create_network(1.0, dim, float(flags["--network_alpha"]), None, *models_of("plain"), **arguments)
    words = set(re.findall(r"[a-z0-9_]+", page.partition("## FLUX.1 and Chroma")[2].partition("\n## ")[0]))
    assert words >= set(LoraFluxNetwork.args_class.own_readers) | set(OftFluxNetwork.args_class.own_readers)


# ---- rates ----


def test_rates_of_encoders_halves_and_patterns(caplog):
    models = models_of("plain")
    network = create_network(
        1.0, 4, 1.0, None, *models, loraplus_unet_lr_ratio="16", network_reg_lrs="single=2e-3", split_qkv="True"
    )
    network.apply_to(*models)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 1e-5], 1e-3, 1e-3)
    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert rates == pytest.approx(
        {
            "textencoder 1": 1e-4, "unet": 1e-3, "unet plus": 16e-3, "unet_reg0": 2e-3, "unet_reg0 plus": 32e-3,
        }
    )  # fmt: skip
    assert "the rate 1e-05 of the textencoder 2 has no effect, it is not trained" in caplog.text
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in network.parameters()}
    plus = next(group["params"] for name, group in zip(names, groups, strict=True) if name == "unet_reg0 plus")
    assert {p.shape[1] for p in plus} == {4} and {tuple(p.shape) for p in plus} >= {(32, 4), (128, 4), (96, 4)}

    network = create_network(1.0, 4, 1.0, None, *models, train_t5xxl="True")
    network.apply_to(*models)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 1e-5], 1e-3, 1e-3)
    assert [group["lr"] for group in groups] == [1e-4, 1e-5, 1e-3]
    _, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-3, 1e-3)
    assert names == ["textencoder 1", "textencoder 2", "unet"] and network.adapts_text_encoders


def test_parts_that_are_not_trained_leave_the_file(tmp_path, caplog):
    models = models_of("plain")
    for applied, start in (((False, True), "lora_unet_"), ((True, False), "lora_te1_")):
        network = create_network(1.0, 4, 1.0, None, *models)
        network.apply_to(*models, *applied)
        network.save_weights(tmp_path / "a.safetensors", torch.bfloat16, {})
        tensors = load_file(tmp_path / "a.safetensors")
        assert all(name.startswith(start) for name in tensors)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert network.adapts_text_encoders == applied[0]
        network.remove()
    create_network(1.0, 4, 1.0, None, *models, train_t5xxl="True").apply_to(*models, False, True)
    assert "train_t5xxl=True has no effect with --network_train_unet_only" in caplog.text
    # Chroma's only encoder is left alone unless asked for
    assert not create_network(1.0, 4, 1.0, None, *flux_models("chroma")).adapts_text_encoders
    encoders, denoiser = flux_models("chroma")
    network = create_network(1.0, 4, 1.0, None, [None, *encoders], denoiser, train_t5xxl="True")
    network.apply_to([None, *encoders], denoiser)
    assert network.adapts_text_encoders


# ---- projections apart ----


def test_projections_are_loras_of_their_own(tmp_path):
    models = models_of("plain")
    network = make(models, split_qkv="True")
    adapter = network.get_submodule("lora_unet_single_blocks_0_linear1")
    assert adapter.widths == (32, 32, 32, 128)
    change = adapter.get_weight()
    for number, rows in enumerate(change.split(list(adapter.widths))):
        down, up = adapter.get_parameter(f"down_{number}"), adapter.get_parameter(f"up_{number}")
        assert down.shape == (4, 32) and up.shape == (len(rows), 4)
        torch.testing.assert_close(rows, 2.0 / 4 * up @ down)
    # any program that reads the file computes the same
    network.save_weights(tmp_path / "a.safetensors", None, {})
    tensors = load_file(tmp_path / "a.safetensors")
    name = "lora_unet_single_blocks_0_linear1"
    down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (16, 32) and up.shape == (224, 16)
    assert is_block_diagonal(up, adapter.widths) and not is_block_diagonal(up.flip(0), adapter.widths)
    torch.testing.assert_close(alpha / 16 * up @ down, change)

    # norms are those of the whole layer, and all projections shrink together
    whole = torch.linalg.vector_norm(change)
    torch.testing.assert_close(adapter.change_norm(), whole)
    network.apply_max_norm_regularization(float(whole.detach()) / 2)
    torch.testing.assert_close(adapter.get_weight(), change / 2)
    network.load_weights(tmp_path / "a.safetensors")

    network.apply_to(*models)
    expected = flux_outputs(*models)
    network.remove()
    joined, _ = create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, *models, split_qkv="False")
    assert not any(isinstance(adapter, SplitLoraModule) for adapter in joined.adapters)
    joined.load_weights(tmp_path / "a.safetensors")
    joined.apply_to(*models)
    assert_close(flux_outputs(*models), expected)
    for again_args in ({}, {"split_qkv": "True"}):
        again, _ = create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, *models, **again_args)
        again.load_weights(tmp_path / "a.safetensors")
        split = [adapter.lora_name for adapter in again.adapters if isinstance(adapter, SplitLoraModule)]
        assert len(split) == 6 and all(name.endswith(("_qkv", "_linear1")) for name in split)
        assert_same(again.state_dict(), network.state_dict())


def test_projections_that_are_not_apart_are_refused(tmp_path):
    models = models_of("plain")
    file = tmp_path / "a.safetensors"
    randomize(create_network(1.0, 12, 1.0, None, *models)).save_weights(file, None, {})
    with pytest.raises(UserError, match="split_qkv=True: the projections of lora_unet_double_blocks_0_img_attn_qkv"):
        create_network_from_weights(1.0, str(file), None, *models, split_qkv="True")
    plain, _ = create_network_from_weights(1.0, str(file), None, *models)
    assert not any(isinstance(adapter, SplitLoraModule) for adapter in plain.adapters)
    dims = {"img_attn_dim": "4", "network_reg_dims": "img_attn_proj=12,te1=12"}
    only = {"train_single_block_indices": "none", **{f"{k}_dim": "0" for k in ("txt_attn", "img_mlp", "txt_mlp")}}
    small = {"img_mod_dim": "0", "txt_mod_dim": "0", **dims, **only}
    split = create_network(1.0, 12, 1.0, None, *models, split_qkv="True", **small)
    kept = {n: t for n, t in load_file(file).items() if n.partition(".")[0] in ranks_of(split)}
    with pytest.raises(
        UserError, match="the file: the projections of lora_unet_double_blocks_0_img_attn_qkv are not apart"
    ):
        split.load_weights_from(kept, "the file")


def make_split(**dropouts):
    from networks.adapter_module import Dropouts

    layer = torch.nn.Linear(8, 12, bias=False)
    found = FoundModule("lora_unet_x_qkv", "x.qkv", layer, widths=(4, 4, 4))
    adapter = SplitLoraModule(found, RankAlpha(6, 6.0, widths=(4, 4, 4)), dropouts=Dropouts(**dropouts))
    randomize(adapter, 1.0)
    adapter.apply_to_original()
    return layer, adapter.train()


def test_dropouts_act_on_each_projection():
    x = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(3))
    layer, adapter = make_split(module=0.5)
    plain, parts = layer.weight @ x[..., None], set()
    for _ in range(64):
        change = layer(x) - plain[..., 0]
        left = tuple(bool(part.abs().max() > 1e-4) for part in change.split(4, dim=-1))
        parts.add(left)
    assert len(parts) == 8  # every set of the three projections
    layer.eval() and adapter.eval()
    whole = layer(x) - plain[..., 0]
    torch.testing.assert_close(whole, x @ adapter.get_weight().T)

    # expectations stay
    for kind in ("neuron", "rank"):
        layer, adapter = make_split(**{kind: 0.5})
        wanted = x @ adapter.get_weight().T
        changes = torch.stack([layer(x) - x @ layer.weight.T for _ in range(400)])
        assert (changes.mean(0) - wanted).abs().mean() < 0.15 * wanted.abs().mean()
        varies = changes.std(0).view(64, 5, 3, 4).mean(dim=(0, 1, 3))
        assert (varies > 0.1).all()


# ---- gradients ----


def gradients(models, network, *, checkpointing, seed=5):
    encoders, denoiser = models
    denoiser.train(checkpointing)
    denoiser.gradient_checkpointing = checkpointing
    network.zero_grad(set_to_none=True)
    network.train()
    torch.manual_seed(seed)
    ids = torch.tensor([[0, 5, 9, 1], [0, 7, 3, 1]])
    text = sum(encoder(ids).last_hidden_state.square().mean() for encoder in encoders)
    (predict(denoiser).square().mean() + text).backward()
    return {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_every_adapter_learns_and_checkpointing_changes_nothing(kind):
    models = models_of(kind)
    network = make(models, **ARGS[kind])
    network.apply_to(*models)
    plain = gradients(models, network, checkpointing=False)
    assert plain.keys() == dict(network.named_parameters()).keys()
    assert not {name for name, gradient in plain.items() if not gradient.any()}
    recomputed = gradients(models, network, checkpointing=True)
    assert_close(recomputed, plain)


@pytest.mark.parametrize(
    "args",
    [
        {"rank_dropout": "0.3", "module_dropout": "0.2"},
        {"dropout": "0.3", "rank_dropout": "0.3", "module_dropout": "0.2", "split_qkv": "True"},
    ],
    ids=["plain", "split"],
)
def test_dropout_under_checkpointing_is_replayed(args):
    models = models_of("plain")
    network = make(models, train_t5xxl="True", **args)
    network.apply_to(*models)
    plain = gradients(models, network, checkpointing=False)
    assert_close(gradients(models, network, checkpointing=True), plain)
    other = gradients(models, network, checkpointing=True, seed=6)
    assert any(not torch.equal(other.get(name, torch.zeros(())), gradient) for name, gradient in plain.items())


def test_training_learns_and_moves_nothing_else():
    models = models_of("plain")
    before = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}
    network = create_network(1.0, 4, 4.0, None, *models, split_qkv="True")
    network.apply_to(*models)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, 2e-2, 2e-2)
    network.prepare_grad_etc(*models)
    optimizer = torch.optim.AdamW(groups)
    target = torch.randn(predict(models[1]).shape, generator=torch.Generator().manual_seed(4))
    losses = []
    for _ in range(12):
        loss = (predict(models[1]) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert_same(models[1].state_dict(), before)
