"""Saving and loading, and the same results in diffusers' own pipeline."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks.files.convert import convert
from networks.lora import create_network, create_network_from_weights
from networks.weights import check_adapter_file, read_weights
from tests.fixtures.installed import require_peft

DORA_ARGS = {"dora": "True", "dora_on_output": "True"}
CONV_ARGS = {"conv_dim": "3", "conv_alpha": "2"}


def make_network(text_encoder, unet, alpha=2.0, **network_args):
    network = create_network(1.0, 4, alpha, None, text_encoder, unet, **network_args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def outputs(text_encoder, unet, inputs):
    latents, timesteps, _ = inputs
    tokens = torch.tensor([[0, 5, 9, 1], [0, 7, 3, 1]])
    with torch.no_grad():
        context = text_encoder(tokens).last_hidden_state
        return unet(latents, timesteps, context).sample


@pytest.mark.parametrize("alpha", [1, 2.0, 0])
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(None, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_stored_types(tmp_path, tiny_unet, tiny_text_encoder, alpha, dtype, stored):
    make_network(tiny_text_encoder, tiny_unet, alpha).save_weights(tmp_path / "a.safetensors", dtype, {"ss_x": "1"})
    tensors = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {stored}
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert {tuple(tensor.shape) for tensor in alphas} == {()}
    assert {float(tensor) for tensor in alphas} == {float(alpha or 4)}


def test_safetensors_carry_metadata_and_hashes(tmp_path, tiny_unet):
    given = {"ss_network_dim": "4"}
    make_network(None, tiny_unet).save_weights(tmp_path / "a.safetensors", None, given)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert len(metadata["sshs_model_hash"]) == 64
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert given == {"ss_network_dim": "4"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_saved_loaded_and_rebuilt_networks_give_the_same_output(
    tmp_path, tiny_unet, tiny_text_encoder, unet_inputs, suffix
):
    file = tmp_path / f"a{suffix}"
    network = make_network(tiny_text_encoder, tiny_unet, **CONV_ARGS)
    network.save_weights(file, None, {})
    network.apply_to(tiny_text_encoder, tiny_unet)
    expected = outputs(tiny_text_encoder, tiny_unet, unet_inputs)
    network.remove()

    loaded = create_network(1.0, 4, 2.0, None, tiny_text_encoder, tiny_unet, **CONV_ARGS)
    loaded.apply_to(tiny_text_encoder, tiny_unet)
    assert str(file) in loaded.load_weights(file)
    assert torch.equal(outputs(tiny_text_encoder, tiny_unet, unet_inputs), expected)
    loaded.remove()

    rebuilt, weights = create_network_from_weights(
        1.0, str(file), None, tiny_text_encoder, tiny_unet, for_inference=True
    )
    rebuilt.load_state_dict(weights)
    rebuilt.apply_to(tiny_text_encoder, tiny_unet)
    assert not rebuilt.training and rebuilt.get_trainable_params() == []
    assert torch.equal(outputs(tiny_text_encoder, tiny_unet, unet_inputs), expected)


def test_ranks_come_from_the_file_with_block_options(tmp_path, tiny_unet):
    file = tmp_path / "a.safetensors"
    dims = ",".join("6" if i == 1 else "2" for i in range(25))
    make_network(None, tiny_unet, block_dims=dims, mid_lr_weight="0").save_weights(file, None, {})
    rebuilt, _ = create_network_from_weights(1.0, str(file), None, None, tiny_unet, rank_dropout="0.1")
    expected = {name: tensor.shape for name, tensor in load_file(file).items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == expected
    assert rebuilt.unet_loras[0].dropouts.rank == 0.1
    with pytest.raises(UserError, match="conv_dim: no effect"):
        create_network_from_weights(1.0, str(file), None, None, tiny_unet, conv_dim="4")


def test_alpha_of_the_file_holds(tmp_path, tiny_unet, unet_inputs):
    file = tmp_path / "a.safetensors"
    make_network(None, tiny_unet, alpha=4.0).save_weights(file, None, {})
    network = create_network(1.0, 4, 1.0, None, None, tiny_unet)
    network.load_weights(file)
    assert {adapter.scale for adapter in network.adapters} == {1.0}


def test_rs_lora_is_in_the_alphas(tmp_path, tiny_unet, unet_inputs):
    """alpha / sqrt(rank), in every program that computes alpha / rank: rank 16 and alpha 2 make 2 / 4."""
    network = create_network(1.0, 16, 2.0, None, None, tiny_unet, rs_lora="True", conv_dim="4", conv_alpha="3")
    scales = {adapter.rank: adapter.scale for adapter in network.adapters}
    assert scales == {16: pytest.approx(2.0 / 4), 4: pytest.approx(3.0 / 2)}
    network.save_weights(tmp_path / "a.safetensors", torch.float16, {})
    rebuilt, weights = create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, None, tiny_unet)
    rebuilt.load_state_dict(weights)
    assert {adapter.rank: adapter.scale for adapter in rebuilt.adapters} == {
        rank: pytest.approx(s) for rank, s in scales.items()
    }
    plain = create_network(1.0, 16, 2.0, None, None, tiny_unet, rs_lora="False")
    assert {adapter.scale for adapter in plain.adapters} == {2.0 / 16}


def test_a_file_without_alphas_has_alpha_equal_to_the_rank(tmp_path, tiny_unet):
    network = make_network(None, tiny_unet)
    weights = {name: t for name, t in network.state_dict().items() if not name.endswith(".alpha")}
    network.load_weights_from(weights, "old.pt")
    assert {adapter.scale for adapter in network.adapters} == {1.0}
    rebuilt, _ = create_network_from_weights(1.0, None, None, None, tiny_unet, weights_sd=weights)
    assert {float(adapter.alpha) for adapter in rebuilt.adapters} == {4.0}


def test_parts_may_be_left_out_but_not_torn(tiny_unet, tiny_text_encoder):
    both = make_network(tiny_text_encoder, tiny_unet)
    weights = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    unet_only = {name: tensor for name, tensor in weights.items() if name.startswith("lora_unet_")}

    assert "nothing for the textencoder" in both.load_weights_from(unet_only, "a.pt")
    trains_unet = create_network(1.0, 4, 1.0, None, tiny_text_encoder, tiny_unet)
    trains_unet.apply_to(tiny_text_encoder, tiny_unet, apply_text_encoder=False)
    assert "textencoder is not trained, its 12 modules were left out" in trains_unet.load_weights_from(weights, "a.pt")

    torn = {name: tensor for name, tensor in weights.items() if "mid_block" not in name}
    with pytest.raises(UserError, match=r"a\.pt: tensors are missing for 12 of the unet's \d+ modules.*mid_block"):
        both.load_weights_from(torn, "a.pt")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2)}, "diffusers/PEFT naming"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}, "FLUX"),
        (
            {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)},
            "made for Stable Diffusion XL",
        ),
        ({}, "holds no"),
    ],
)
def test_files_of_other_kinds_are_named(tiny_unet, weights, said):
    network = create_network(1.0, 4, 1.0, None, None, tiny_unet)
    with pytest.raises(UserError, match=said):
        network.load_weights_from(weights, "a.pt")
    with pytest.raises(UserError, match=said):
        create_network_from_weights(1.0, None, None, None, tiny_unet, weights_sd=weights)


def test_other_ranks_and_other_models_are_told_apart(tiny_unet):
    network = create_network(1.0, 4, 1.0, None, None, tiny_unet)
    wider = create_network(1.0, 8, 1.0, None, None, tiny_unet).state_dict()
    with pytest.raises(UserError, match=r"\[8, 8, 1, 1\] in the file and \[4, 8, 1, 1\].*--dim_from_weights"):
        network.load_weights_from(wider, "a.pt")
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    other = network.state_dict() | {name: torch.ones(99, 4)}
    with pytest.raises(UserError, match="made for another model"):
        network.load_weights_from(other, "a.pt")


def test_missing_file_and_unknown_extension(tmp_path, tiny_unet):
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="saved as .safetensors"):
        create_network(1.0, 4, 1.0, None, None, tiny_unet).save_weights(tmp_path / "a.txt", None, {})


@pytest.mark.parametrize(
    ("network_args", "converted"), [({}, False), (CONV_ARGS, False), (CONV_ARGS, True), (DORA_ARGS, True)]
)
def test_diffusers_gives_the_same_output(tmp_path, tiny_unet, tiny_text_encoder, unet_inputs, network_args, converted):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    network = make_network(tiny_text_encoder, tiny_unet, alpha=3.0, **network_args)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    if converted:
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
        assert "unet.mid_block.attentions.0.proj_in.lora_A.weight" in load_file(tmp_path / "b.safetensors")
    before = outputs(tiny_text_encoder, tiny_unet, unet_inputs)
    network.apply_to(tiny_text_encoder, tiny_unet)
    ours = outputs(tiny_text_encoder, tiny_unet, unet_inputs)
    network.remove()

    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=tiny_text_encoder, tokenizer=None, unet=tiny_unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    require_peft(text_encoders=True)
    pipeline.load_lora_weights(tmp_path, weight_name="b.safetensors" if converted else "a.safetensors")
    theirs = outputs(pipeline.text_encoder, pipeline.unet, unet_inputs)

    assert not torch.allclose(ours, before, atol=1e-2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_models_are_no_adapters(tmp_path, tiny_unet):
    """The header shows it, before anything is loaded."""
    make_network(None, tiny_unet).save_weights(tmp_path / "lora.safetensors", None, {})
    check_adapter_file(tmp_path / "lora.safetensors")
    for name in ("transformer.single_transformer_blocks.0.attn.to_q.lora.down.weight", "lycoris_a.lokr_w1"):
        save_file({name: torch.zeros(1)}, tmp_path / "other.safetensors")
        check_adapter_file(tmp_path / "other.safetensors")
    names = ("cond_stage_model.transformer.x", "model.diffusion_model.input_blocks.0.0.weight")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match="model.safetensors is a Stable Diffusion 1.x or 2.x checkpoint, not an adapter"
    ):
        check_adapter_file(tmp_path / "model.safetensors")
