"""Learning rates, parameter groups and block-wise options."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.training.network_module import parse_network_args
from networks.lora import create_network


def ones(count, **changes):
    values = ["1"] * count
    for index, value in changes.items():
        values[int(index.lstrip("b"))] = value
    return ",".join(values)


def applied(text_encoder, unet, **network_args):
    network = create_network(1.0, 4, 1.0, None, text_encoder, unet, **network_args)
    network.apply_to(text_encoder, unet)
    return network


def test_a_network_arg_has_one_value():
    assert parse_network_args(["conv_dim=2", "conv_dim = 2", "a=b=c"]) == {"conv_dim": "2", "a": "b=c"}
    with pytest.raises(UserError, match="^--network_args: conv_dim is given as '2' and as '4'; give it once$"):
        parse_network_args(["conv_dim=2", "conv_dim=4"])


def test_one_group_for_each_part(tiny_unet, tiny_text_encoder):
    network = applied(tiny_text_encoder, tiny_unet)
    groups, descriptions = network.prepare_optimizer_params(1e-5, 1e-4, 1e-3)
    assert descriptions == ["textencoder", "unet"]
    assert [group["lr"] for group in groups] == [1e-5, 1e-4]
    assert sum(len(group["params"]) for group in groups) == len(network.get_trainable_params())


def test_default_rate_stands_in(tiny_unet, tiny_text_encoder):
    network = applied(tiny_text_encoder, tiny_unet)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([2e-5], None, 1e-3)
    assert [group["lr"] for group in groups] == [2e-5, 1e-3]
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, None)
    assert all("lr" not in group for group in groups)


@pytest.mark.parametrize("rate", [0, 0.0, [0.0]])
def test_rate_zero_leaves_the_text_encoder_untrained(tiny_unet, tiny_text_encoder, rate):
    network = applied(tiny_text_encoder, tiny_unet)
    _, descriptions = network.prepare_optimizer_params(rate, 1e-4, 1e-3)
    network.prepare_grad_etc(tiny_text_encoder, tiny_unet)
    assert descriptions == ["unet"]
    assert not any(p.requires_grad for adapter in network.text_encoder_loras for p in adapter.parameters())
    assert all(p.requires_grad for adapter in network.unet_loras for p in adapter.parameters())


def test_wrong_rates_are_refused(tiny_unet, tiny_text_encoder):
    network = applied(tiny_text_encoder, tiny_unet)
    with pytest.raises(UserError, match="nothing to train"):
        network.prepare_optimizer_params(0, 0, 1e-3)
    with pytest.raises(UserError, match="has 2 values, and text encoders are 1; give one"):
        network.prepare_optimizer_params_with_multiple_te_lrs([1e-5, 1e-5], 1e-4, 1e-3)


def test_lora_plus(tiny_unet, tiny_text_encoder):
    network = applied(tiny_text_encoder, tiny_unet, loraplus_lr_ratio="16", loraplus_text_encoder_lr_ratio="4")
    groups, descriptions = network.prepare_optimizer_params(1e-5, 1e-4, 1e-3)
    assert descriptions == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 4e-5, 1e-4, 16e-4])
    ups = {id(adapter.lora_up.weight) for adapter in network.unet_loras}
    assert {id(parameter) for parameter in groups[3]["params"]} == ups


def test_block_rates(tiny_unet, tiny_text_encoder):
    network = applied(
        tiny_text_encoder, tiny_unet, down_lr_weight=ones(12, b1="0.5"), mid_lr_weight="0", loraplus_unet_lr_ratio="2"
    )
    assert not any("mid_block" in adapter.lora_name for adapter in network.unet_loras)
    groups, descriptions = network.prepare_optimizer_params(1e-5, 1e-4, 1e-3)
    # the tiny U-Net has attention in its first input block and in the second level's output blocks
    assert descriptions == ["textencoder"] + [f"unet_block{i}{plus}" for i in (1, 16, 17) for plus in ("", " plus")]
    assert [group["lr"] for group in groups[1:]] == pytest.approx([0.5e-4, 1e-4, 1e-4, 2e-4, 1e-4, 2e-4])


def test_block_rates_at_the_threshold_make_no_modules(tiny_unet):
    network = create_network(
        1.0, 4, 1.0, None, None, tiny_unet, down_lr_weight=ones(12, b1="0.1"), block_lr_zero_threshold="0.1"
    )
    assert not any("down_blocks" in adapter.lora_name for adapter in network.unet_loras)


def test_block_ranks_and_alphas(tiny_unet, tiny_text_encoder):
    network = create_network(
        1.0, 4, 1.0, None, tiny_text_encoder, tiny_unet,
        block_dims=ones(25, b1="6", b12="0"), block_alphas=ones(25, b1="3"),
        conv_block_dims=ones(25, b1="5"), conv_block_alphas=ones(25, b1="2.5"),
    )  # fmt: skip
    sizes = {adapter.lora_name: (adapter.rank, float(adapter.alpha)) for adapter in network.adapters}
    assert sizes["lora_unet_down_blocks_0_attentions_0_proj_in"] == (6, 3.0)
    assert sizes["lora_unet_down_blocks_0_resnets_0_conv1"] == (5, 2.5)
    assert sizes["lora_unet_down_blocks_1_resnets_0_time_emb_proj"] == (1, 1.0)
    assert "lora_unet_mid_block_attentions_0_proj_in" not in sizes
    assert "lora_unet_mid_block_resnets_0_conv1" in sizes
    assert sizes["lora_te_text_model_encoder_layers_0_mlp_fc1"] == (4, 1.0)


def test_block_rates_as_curves(tiny_unet):
    network = create_network(
        1.0, 4, 1.0, None, None, tiny_unet, down_lr_weight="zeros", up_lr_weight="reverse_linear+0.5"
    )
    network.apply_to(None, tiny_unet)
    groups, descriptions = network.prepare_optimizer_params(None, 1.0, None)
    assert descriptions == ["unet_block12", "unet_block16", "unet_block17"]
    # blocks 16 and 17 are the fourth and fifth of the twelve output blocks
    assert [group["lr"] for group in groups] == pytest.approx([1.0, 1.5 - 3 / 11, 1.5 - 4 / 11])


def test_a_curve_that_ends_at_0_leaves_no_adapter_there(tiny_unet):
    """The last of twelve output blocks is where the cosine is 0."""
    rates = {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "cosine"}
    network = create_network(1.0, 4, 1.0, None, None, tiny_unet, **rates)
    assert network.args.block_lr_weights[-1] == 0.0 and network.args.block_lr_weights[13] == 1.0


def test_ranks_by_pattern(tiny_unet, tiny_text_encoder):
    network = create_network(
        1.0, 4, 2.0, None, tiny_text_encoder, tiny_unet, network_reg_dims="mid_block=0,to_q=8,attn[12]=6,mlp=3"
    )
    ranks = {adapter.lora_name: adapter.rank for adapter in network.adapters}
    assert ranks["lora_unet_down_blocks_0_attentions_0_proj_in"] == 4
    assert ranks["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"] == 6
    assert ranks["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"] == 8
    assert ranks["lora_te_text_model_encoder_layers_0_mlp_fc1"] == 3
    assert not any("mid_block" in name for name in ranks)
    assert {float(adapter.alpha) for adapter in network.adapters} == {2.0}
    with pytest.raises(UserError, match='network_reg_dims: "atn" is in none'):
        create_network(1.0, 4, 2.0, None, None, tiny_unet, network_reg_dims="atn=6")


@pytest.mark.parametrize(
    ("dim", "args"), [(10**9, {}), (4, {"conv_dim": "1000000000"}), (4, {"network_reg_dims": "to_q=1000000000"})]
)
def test_a_rank_that_no_memory_has_room_for_is_refused(tiny_unet, dim, args):
    with pytest.raises(UserError, match="rank 1,000,000,000 for a layer of"):
        create_network(1.0, dim, 2.0, None, None, tiny_unet, **args)


def test_rates_by_pattern(tiny_unet, tiny_text_encoder):
    network = applied(
        tiny_text_encoder,
        tiny_unet,
        network_reg_lrs="to_q=0,attn=5e-3,mlp=7e-3",
        mid_lr_weight="0.5",
        loraplus_unet_lr_ratio="2",
    )
    groups, descriptions = network.prepare_optimizer_params(1e-5, 1e-4, 1e-3)
    network.prepare_grad_etc(tiny_text_encoder, tiny_unet)
    rates = {name: group["lr"] for name, group in zip(descriptions, groups, strict=True)}
    # self_attn of the text encoder holds "attn" too
    assert "textencoder" not in rates
    assert rates["textencoder_reg1"] == 5e-3 and rates["textencoder_reg2"] == 7e-3
    assert rates["unet_reg1"] == 5e-3 and rates["unet_reg1 plus"] == 1e-2
    assert rates["unet_block12"] == 0.5e-4
    assert "unet_reg0" not in rates
    trained = {adapter.lora_name for adapter in network.adapters if adapter.lora_down.weight.requires_grad}
    assert trained and not any(name.endswith("to_q") for name in trained)
    # a rate by pattern holds even where the part's is 0
    _, descriptions = network.prepare_optimizer_params(0, 0, 1e-3)
    assert descriptions == ["textencoder_reg1", "textencoder_reg2", "unet_reg1", "unet_reg1 plus"]
    with pytest.raises(UserError, match='network_reg_lrs: "resnets" is in none'):
        create_network(1.0, 4, 2.0, None, None, tiny_unet, network_reg_lrs="resnets=1")


def test_training_step_changes_what_is_trained_only(tiny_unet, tiny_text_encoder, unet_inputs):
    network = applied(tiny_text_encoder, tiny_unet)
    groups, _ = network.prepare_optimizer_params(0, 1e-2, 1e-2)
    network.prepare_grad_etc(tiny_text_encoder, tiny_unet)
    network.on_epoch_start(tiny_text_encoder, tiny_unet)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):  # the down half moves once the up half has left zero
        latents, timesteps, context = unet_inputs
        tiny_unet(latents, timesteps, context).sample.square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("lora_unet_") and name.endswith(".weight")}


def gradients(network, text_encoder, unet, inputs):
    latents, timesteps, _ = inputs
    network.zero_grad()
    context = text_encoder(torch.tensor([[0, 5, 9, 1], [0, 7, 3, 1]])).last_hidden_state
    unet(latents, timesteps, context).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(tiny_unet, tiny_text_encoder, unet_inputs):
    network = applied(tiny_text_encoder, tiny_unet, conv_dim="2")
    for adapter in network.adapters:
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.1)
    tiny_text_encoder.train()
    plain = gradients(network, tiny_text_encoder, tiny_unet, unet_inputs)
    tiny_unet.enable_gradient_checkpointing()
    tiny_text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    network.enable_gradient_checkpointing()
    checkpointed = gradients(network, tiny_text_encoder, tiny_unet, unet_inputs)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_network_may_be_prepared_by_accelerate(tiny_unet, unet_inputs, mixed_precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=True)
    network = applied(None, tiny_unet)
    groups, _ = network.prepare_optimizer_params(None, 1e-2, None)
    prepared = accelerator.prepare_model(network, evaluation_mode=True)
    assert prepared.get_trainable_params() == [p for group in groups for p in group["params"]]
    latents, timesteps, context = unet_inputs
    with accelerator.autocast():
        loss = tiny_unet(latents, timesteps, context).sample.float().square().mean()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in prepared.parameters())
    AcceleratorState._reset_state(reset_partial_state=True)


def test_hooked_modules_compile_without_a_graph_break():
    from networks.adapter_module import Dropouts
    from networks.lora import LoraModule
    from networks.targets import FoundModule, RankAlpha

    module = torch.nn.Linear(6, 5).requires_grad_(False)
    dropouts = Dropouts(neuron=0.1, rank=0.1)
    adapter = LoraModule(FoundModule("lora_unet_x", "x", module), RankAlpha(2, 1.0), dropouts=dropouts)
    torch.nn.init.normal_(adapter.lora_up.weight)
    adapter.apply_to_original()
    adapter.eval()
    x = torch.randn(3, 6)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    adapter.train()
    compiled(x)
