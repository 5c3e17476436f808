"""DyLoRA: a step trains one block of ranks; all ranks are a LoRA, and so are the first ones."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks.dylora import DyLoraModule, create_network, create_network_from_weights
from networks.lora import create_network as create_lora
from networks.lora_module import LoraModule
from networks.targets import FoundModule, RankAlpha
from tests.fixtures.adapted import randomize, sdxl_outputs


def applied(text_encoder, unet, **network_args):
    network = create_network(1.0, 4, 2.0, None, text_encoder, unet, **network_args)
    network.apply_to(text_encoder, unet)
    return network


def one_module(module, unit=2, rank=6, alpha=3.0):
    adapter = randomize(DyLoraModule(FoundModule("lora_unet_x", "x", module), RankAlpha(rank, alpha), unit=unit), 0.3)
    adapter.apply_to_original()
    return adapter


@pytest.mark.parametrize(
    ("module", "shape"),
    [(torch.nn.Linear(6, 5), (2, 3, 6)), (torch.nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 4, 4))],
)
def test_a_step_is_the_paper_s_formula(module, shape):
    """W x + alpha / b U[:, :b] D[:b] x, with gradients for the last block of the b ranks alone."""
    module.requires_grad_(False)
    adapter = one_module(module)
    down, up = (half.detach().clone() for half in adapter.halves())
    x = torch.randn(shape)
    for block, ranks in enumerate((2, 4, 6)):
        adapter.train().train_block(block)
        product = torch.einsum("or,r...->o...", up[:, :ranks].flatten(1), down[:ranks])
        weight = module.weight + 3.0 / ranks * product
        if isinstance(module, torch.nn.Conv2d):
            expected = torch.nn.functional.conv2d(x, weight, module.bias, 2, 1)
        else:
            expected = torch.nn.functional.linear(x, weight, module.bias)
        out = module(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        adapter.zero_grad()
        out.square().mean().backward()
        moved = {name for name, parameter in adapter.named_parameters() if parameter.grad is not None}
        assert moved == {f"down_{block}", f"up_{block}"}
    adapter.train_block(0)
    adapter.eval()  # all ranks again, whatever the step was
    whole = LoraModule(FoundModule("lora_unet_x", "x", module), RankAlpha(6, 3.0))
    whole.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter.get_weight(), whole.get_weight())
    assert torch.equal(adapter.low_rank_output(x), whole.low_rank_output(x))


def test_what_a_step_does_not_train_stays_to_the_bit(tiny_unet, tiny_text_encoder, unet_inputs):
    """Not even by an optimizer's momentum and decay."""
    network = applied(tiny_text_encoder, tiny_unet, unit="2", loraplus_lr_ratio="4")
    groups, names = network.prepare_optimizer_params(1e-3, 1e-2, None)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    network.prepare_grad_etc(tiny_text_encoder, tiny_unet)
    network.on_epoch_start(tiny_text_encoder, tiny_unet)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    latents, timesteps, _ = unet_inputs
    trained = Counter()
    for step in range(8):
        network.begin_step(3, step)
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        context = tiny_text_encoder(torch.tensor([[0, 5, 9, 1], [0, 7, 3, 1]])).last_hidden_state
        tiny_unet(latents, timesteps, context).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        changed = {n[-1] for n, p in network.named_parameters() if not torch.equal(p.detach(), before[n])}
        assert len(changed) == 1
        trained.update(changed)
    assert set(trained) == {"0", "1"}


def test_the_rank_of_a_step_is_a_function_of_seed_and_step(tiny_unet):
    networks = [create_network(1.0, 8, 1.0, None, None, tiny_unet) for _ in range(2)]

    def drawn(network, seed, step):
        network.begin_step(seed, step)
        assert len({adapter._block for adapter in network.adapters}) == 1
        return network.adapters[0]._block

    forwards = [drawn(networks[0], 1, step) for step in range(400)]
    torch.manual_seed(9)
    backwards = [drawn(networks[1], 1, step) for step in reversed(range(400))]
    assert forwards == backwards[::-1]
    assert forwards != [drawn(networks[0], 2, step) for step in range(400)]
    counts = Counter(forwards)
    assert set(counts) == set(range(8)) and min(counts.values()) > 25  # uniform: 50 each


def test_a_part_that_is_not_trained_stays_so(tiny_unet, tiny_text_encoder):
    network = applied(tiny_text_encoder, tiny_unet)
    network.prepare_optimizer_params(0, 1e-3, None)
    network.prepare_grad_etc(tiny_text_encoder, tiny_unet)
    network.begin_step(1, 0)
    assert not any(p.requires_grad for adapter in network.text_encoder_loras for p in adapter.parameters())
    assert all(sum(p.requires_grad for p in adapter.parameters()) == 2 for adapter in network.unet_loras)


def test_norms_are_those_of_all_ranks(tiny_unet):
    network = randomize(create_network(1.0, 4, 4.0, None, None, tiny_unet, unit="2"))
    network.begin_step(1, 0)
    norms = network.weight_norms()
    assert norms[0] == pytest.approx(float(network.adapters[0].get_weight().detach().norm()), rel=1e-4)
    limit = float(norms.median())
    network.apply_max_norm_regularization(limit)
    torch.testing.assert_close(network.weight_norms(), norms.clamp(max=limit))


def test_a_lora_reads_its_files_and_the_other_way_round(tmp_path, tiny_unet):
    network = randomize(create_network(1.0, 4, 2.0, None, None, tiny_unet, unit="2", conv_dim="4"))
    network.save_weights(tmp_path / "a.safetensors", None, {})
    lora = create_lora(1.0, 4, 1.0, None, None, tiny_unet, conv_dim="4")
    lora.load_weights(tmp_path / "a.safetensors")
    lora.save_weights(tmp_path / "b.safetensors", None, {})
    again, _ = create_network_from_weights(1.0, str(tmp_path / "b.safetensors"), None, None, tiny_unet, unit="1")
    again.load_weights(tmp_path / "b.safetensors")
    for one, two, three in zip(network.adapters, lora.adapters, again.adapters, strict=True):
        assert torch.equal(one.get_weight(), two.get_weight()) and torch.equal(one.get_weight(), three.get_weight())
    with pytest.raises(UserError, match=r"lora_down.weight is .*; use --dim_from_weights"):
        create_network(1.0, 2, 2.0, None, None, tiny_unet, conv_dim="2").load_weights(tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="down_0"):
        create_network(1.0, 2, 2.0, None, None, tiny_unet).load_state_dict(network.state_dict())


def test_ranks_that_do_not_fit_are_refused(tmp_path, tiny_unet):
    with pytest.raises(UserError, match="unit=3: must divide the rank, 4"):
        create_network(1.0, 4, 1.0, None, None, tiny_unet, unit="3")
    with pytest.raises(UserError, match="conv_dim=2: .* make it --network_dim, 4"):
        create_network(1.0, 4, 1.0, None, None, tiny_unet, conv_dim="2")
    create_network(1.0, 4, 1.0, None, None, tiny_unet).save_weights(tmp_path / "a.safetensors", None, {})
    with pytest.raises(UserError, match="unit=3: must divide the rank, 4 in lora_unet_"):
        create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, None, tiny_unet, unit="3")


# ---- the two text encoders of SDXL ----


def test_both_text_encoders_are_in_the_file(tmp_path, sdxl_models):
    network = randomize(create_network(1.0, 4, 2.0, None, *sdxl_models))
    network.save_weights(tmp_path / "a.safetensors", None, {})
    prefixes = Counter(name.split("_text_model")[0] for name in load_file(tmp_path / "a.safetensors") if "_te" in name)
    sizes = [len(part.adapters) * 3 for part in network.parts[:2]]
    assert prefixes == {"lora_te1": sizes[0], "lora_te2": sizes[1]}


def test_old_files_are_read_with_a_warning(tmp_path, sdxl_models, caplog):
    """The predecessor wrote the second encoder under the name of both."""
    plain = sdxl_outputs(*sdxl_models)
    network = randomize(create_network(1.0, 4, 2.0, None, *sdxl_models)).eval()
    network.apply_to(*sdxl_models)
    expected = sdxl_outputs(*sdxl_models)
    network.remove()
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items() if "lora_te1_" not in name}
    save_file({name.replace("lora_te2_", "lora_te_"): t for name, t in tensors.items()}, tmp_path / "old.safetensors")

    with caplog.at_level(logging.WARNING):
        old, weights = create_network_from_weights(1.0, str(tmp_path / "old.safetensors"), None, *sdxl_models)
    assert "textencoder 2 (lora_te2) by their shapes; what was trained of textencoder 1 is lost" in caplog.text
    old.apply_to(*sdxl_models)
    old.load_state_dict(weights)
    old.eval()
    found = sdxl_outputs(*sdxl_models)
    assert torch.equal(found["hidden_state1"], plain["hidden_state1"])
    assert torch.equal(found["hidden_state2"], expected["hidden_state2"])
    assert not torch.equal(expected["hidden_state1"], plain["hidden_state1"])
    assert torch.equal(found["prediction"], expected["prediction"])
    old.remove()

    fresh = create_network(1.0, 4, 2.0, None, *sdxl_models)
    assert "the file has nothing for the textencoder 1" in fresh.load_weights(tmp_path / "old.safetensors")
    caplog.clear()
    fresh.load_weights_from(network.state_dict(), "a new file")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
