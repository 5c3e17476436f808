"""extract_lora_from_models.py on tiny checkpoints of SD 1.x, 2.x and SDXL."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from library.files.safetensors_io import read_header
from networks import extract_lora_from_models as tool
from tests.fixtures.file_tools import refusal as refusal_of
from tests.fixtures.file_tools import run_tool, saved
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tests.networks.test_merge_lora import checkpoint, make, products  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("own_root_logger")


def test_a_lora_that_was_merged_is_found_again(tmp_path, checkpoint):  # noqa: F811
    file = make(checkpoint, tmp_path / "lora.safetensors", rank=2, conv_dim="2")
    run_tool(checkpoint.tool, sd_model=checkpoint.path, models=file, save_to=tmp_path / "tuned.safetensors")
    options = {"model_org": checkpoint.path, "model_tuned": tmp_path / "tuned.safetensors"}
    flags = {"sd": {}, "sd2": {"v2": True}, "sdxl": {"sdxl": True}}[checkpoint.kind]
    run_tool(
        tool,
        **options,
        **flags,
        save_to=tmp_path / "found.safetensors",
        dim=2,
        conv_dim=2,
        clamp_quantile=1,
        min_diff=0,
    )
    one, found = products(load_file(file)), products(load_file(tmp_path / "found.safetensors"))
    assert found.keys() == one.keys()
    for name, change in one.items():
        torch.testing.assert_close(found[name], change, atol=1e-5, rtol=1e-4)
    metadata = read_header(tmp_path / "found.safetensors").metadata
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == "2"
    assert metadata["ss_v2"] == str(checkpoint.kind == "sd2") and len(metadata["sshs_model_hash"]) == 64
    assert metadata["ss_network_args"] == '{"conv_dim": "2", "conv_alpha": "2.0"}'
    # linear layers alone, and text encoders that hardly differ are left out
    run_tool(tool, **options, save_to=tmp_path / "some.safetensors", dim=2, min_diff=1e3)
    some = {key.partition(".")[0] for key in load_file(tmp_path / "some.safetensors")}
    assert some and not any("_te" in name or "resnets" in name or "in_layers" in name for name in some)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_model_that_was_only_rounded_is_recognised(tmp_path, capsys, dtype):
    before = make_tiny_sd(tmp_path / "model.safetensors").path
    weights = load_file(before)
    small = saved(tmp_path / "small.safetensors", {name: t.to(dtype).float() for name, t in weights.items()})
    out = tmp_path / "out.safetensors"
    line = refusal_of(capsys, out, tool, model_org=before, model_tuned=small, save_to=out)
    assert "only rounded to a smaller type; nothing to extract" in line
    # one layer that was trained is found among them
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    changed = {key: t.to(dtype).float() for key, t in weights.items()}
    changed[name] = changed[name] + 0.1 * torch.randn(changed[name].shape, generator=torch.Generator().manual_seed(0))
    run_tool(tool, model_org=before, model_tuned=saved(tmp_path / "t.safetensors", changed), save_to=out)
    assert {key.partition(".")[0] for key in load_file(out)} == {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    }


def test_diffusers_folders_are_read(tmp_path):
    for make_model, name in ((make_tiny_sd, "sd"), (make_tiny_sdxl, "xl")):
        one, other = (make_model(tmp_path / f"{name}{n}.safetensors", seed=n).path for n in range(2))
        folder = make_model(tmp_path / f"{name}_folder", layout="diffusers", seed=0).path
        options = {"model_tuned": other, "dim": 2, "clamp_quantile": 1, "load_precision": "bf16"}
        run_tool(tool, model_org=one, save_to=tmp_path / "one.safetensors", **options)
        assert any("_te" in key for key in load_file(tmp_path / "one.safetensors"))
        run_tool(tool, model_org=folder, save_to=tmp_path / "two.safetensors", **options)
        two = load_file(tmp_path / "two.safetensors")
        assert two.keys() == load_file(tmp_path / "one.safetensors").keys()


def test_errors_are_one_line(tmp_path, capsys):
    one, other = (make_tiny_sd(tmp_path / f"{n}.safetensors", seed=n).path for n in range(2))
    xl, out = make_tiny_sdxl(tmp_path / "xl.safetensors").path, tmp_path / "out.safetensors"
    refusal = partial(refusal_of, capsys, out, tool, model_org=one, save_to=out)
    assert "--dim 0" in refusal(model_tuned=other, dim=0)
    assert "--min_diff" in refusal(model_tuned=other, min_diff=-1)
    assert "--sdxl" in refusal(model_tuned=other, sdxl=True)
    assert "different" in refusal(model_tuned=xl)
    lora = saved(tmp_path / "l.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(2, 2)})
    assert "no model that adapters are known for" in refusal(model_org=lora, model_tuned=other)
