"""LoRA of SDXL: the same results in diffusers' pipeline, other programs' names, ranks and rates by block."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.sdxl import SDXL
from library.errors import UserError
from networks.files.convert import convert
from networks.lora import check_network_args, create_network, create_network_from_weights
from tests.fixtures.adapted import randomize
from tests.fixtures.adapted import sdxl_outputs as outputs
from tests.fixtures.installed import require_peft

CONV = {"conv_dim": "2", "conv_alpha": "2"}


@pytest.fixture
def folder(sdxl_folder):
    return sdxl_folder


@pytest.fixture
def models(sdxl_models):
    return sdxl_models


def make_network(models, **network_args):
    network = create_network(1.0, 4, 2.0, None, *models, **network_args)
    return randomize(network)


def assert_close(one, other, tolerance=1e-5):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("args", "converted"), [({}, False), (CONV, False), (CONV, True)], ids=["linear", "conv", "conv, diffusers' names"]
)
def test_diffusers_pipeline_computes_the_same(tmp_path, folder, models, args, converted):
    require_peft(text_encoders=True)
    from diffusers import StableDiffusionXLPipeline

    plain = outputs(*models)
    network = make_network(models, **args)
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    network.apply_to(*models)
    ours = outputs(*models)
    assert all((ours[name] - plain[name]).abs().max() > 1e-3 for name in ours)

    file = tmp_path / "lora.safetensors"
    if converted:
        convert(file, tmp_path / "diffusers.safetensors", "diffusers")
        file = tmp_path / "diffusers.safetensors"
        assert not any("lora_up" in name or "alpha" in name for name in load_file(file))
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder))
    pipeline.load_lora_weights(str(file))
    theirs = outputs((pipeline.text_encoder, pipeline.text_encoder_2), pipeline.unet)
    assert_close(ours, theirs)


def test_a_lora_that_diffusers_and_peft_wrote_loads(tmp_path, folder, models):
    require_peft(text_encoders=True)
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder))
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    for name, part in parts.items():
        targets = ["to_q", "to_out.0", "ff.net.2"] if name == "unet" else ["q_proj", "fc1"]
        part.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in parts.values():
            for key, parameter in part.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    layers = {name: get_peft_model_state_dict(part) for name, part in parts.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        text_encoder_2_lora_layers=layers["text_encoder_2"],
        **{f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()},
    )
    theirs = outputs((pipeline.text_encoder, pipeline.text_encoder_2), pipeline.unet)

    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert any(".lora_A.weight" in name for name in load_file(file))
    network, weights = create_network_from_weights(1.0, str(file), None, *models)
    network.apply_to(*models)
    network.load_weights(file)
    assert {float(adapter.alpha) for adapter in network.adapters} == {6.0}
    assert_close(outputs(*models), theirs)
    # and merged for good
    network.remove()
    network.merge_to(*models, weights)
    assert_close(outputs(*models), theirs, 1e-4)


def test_published_names_with_diffusers_modules_load(tmp_path, models):
    network = make_network(models, **CONV)
    ours = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    by_path = {}
    for part in network.parts:
        for path, adapter in part.adapters.items():
            level = "text_model." if part.label == "textencoder 1" else ""
            by_path[adapter.lora_name] = f"{part.target.prefix}_{level}{path}".replace(".", "_")
    renamed = {f"{by_path[name.partition('.')[0]]}.{name.partition('.')[2]}": t for name, t in ours.items()}
    assert "lora_unet_mid_block_attentions_0_proj_in.alpha" in renamed
    save_file(renamed, tmp_path / "diffusers.safetensors")
    again, _ = create_network_from_weights(1.0, str(tmp_path / "diffusers.safetensors"), None, *models)
    again.load_weights(tmp_path / "diffusers.safetensors")
    loaded = again.state_dict()
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.items())


def test_files_of_another_family_are_named(tmp_path, models):
    save_file({"lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(2, 3)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="made for FLUX"):
        create_network_from_weights(1.0, str(tmp_path / "flux.safetensors"), None, *models)


def test_files_of_this_family_that_do_not_fit_say_why(tmp_path, models):
    network = make_network(models, **CONV)
    network.save_weights(tmp_path / "conv.safetensors", None, {})
    with pytest.raises(UserError, match="made .* with other --network_args, than this networks.lora"):
        create_network(1.0, 4, 2.0, None, *models).load_weights(tmp_path / "conv.safetensors")
    tensors = {name: t.clone() for name, t in network.state_dict().items() if "lora_te1_" not in name}
    save_file({name.replace("lora_te2_", "lora_te_"): t for name, t in tensors.items()}, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match="old DyLoRA of SDXL.*use networks.dylora"):
        create_network_from_weights(1.0, str(tmp_path / "old.safetensors"), None, *models)
    with pytest.raises(UserError, match="lora_te_text_model.*old DyLoRA.*extract_lora_from_dylora.py"):
        convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "diffusers")


def test_ranks_and_rates_by_block(models):
    dims = [4] * 23
    dims[5], dims[11] = 8, 0  # the first block with attention; the middle block's attention
    network = create_network(1.0, 4, 1.0, None, *models, block_dims=",".join(map(str, dims)))
    ranks = {a.lora_name: a.rank for a in network.unet_loras}
    assert {rank for name, rank in ranks.items() if name.startswith("lora_unet_input_blocks_4_")} == {8}
    assert not any("middle_block" in name for name in ranks)
    assert {rank for name, rank in ranks.items() if name.startswith("lora_unet_input_blocks_5_")} == {4}

    rates = {"down_lr_weight": "0,0,0,0,1,1,1,1,1", "mid_lr_weight": "1,0.5,1", "up_lr_weight": "cosine+0.5"}
    check_network_args(rates, SDXL.denoiser_target)
    network = create_network(1.0, 4, 1.0, None, *models, **rates)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 2e-4], 1e-3, 1e-3)
    by_name = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert by_name["textencoder 1"] == 1e-4 and by_name["textencoder 2"] == 2e-4
    assert by_name["unet_block11"] == pytest.approx(5e-4) and by_name["unet_block5"] == pytest.approx(1e-3)
    with pytest.raises(UserError, match="mid_lr_weight.*must have 3 comma-separated values"):
        check_network_args({"mid_lr_weight": "1"}, SDXL.denoiser_target)
