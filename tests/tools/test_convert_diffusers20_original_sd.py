"""Checkpoints and diffusers folders of tiny models, there and back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from library.files.safetensors_io import load_pickle, read_header
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl
from tools import convert_diffusers20_original_sd as tool

pytestmark = pytest.mark.usefixtures("own_root_logger")

MAKERS = {
    "sd": make_tiny_sd,
    "sd2": lambda path, **how: make_tiny_sd(path, v2=True, **how),
    "sdxl": make_tiny_sdxl,
}


def convert(*words: object) -> None:
    tool.main(tool.setup_parser().parse_args([str(word) for word in words]))


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        convert(*words)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    return line


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", MAKERS)
def test_there_and_back_is_bit_by_bit(tmp_path, kind):
    file = MAKERS[kind](tmp_path / "model.safetensors").path
    reference = MAKERS[kind](tmp_path / "reference", layout="diffusers").path
    convert(file, tmp_path / "folder", "--use_safetensors", "--reference_model", reference)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == ("StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline")
    assert (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    scheduler = "scheduler/scheduler_config.json"
    assert (tmp_path / "folder" / scheduler).read_text() == (reference / scheduler).read_text()
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "--metadata", "{'a': 1}")
    before, back = load_file(file), load_file(tmp_path / "back.safetensors")
    # what no model has is made up: the last block of SD 2.x's text encoder, logit_scale
    unused = {name for name in before if "logit_scale" in name or "text_projection" in name or "resblocks.2." in name}
    kept = before.keys() - (unused if kind != "sd" else set())
    assert before.keys() == back.keys() and same({name: before[name] for name in kept}, back)
    assert read_header(tmp_path / "back.safetensors").metadata["a"] == "1"


def test_diffusers_loads_the_folder(tmp_path):
    from diffusers import StableDiffusionPipeline

    file = make_tiny_sd(tmp_path / "model.safetensors").path
    reference = make_tiny_sd(tmp_path / "reference", layout="diffusers").path
    convert(file, tmp_path / "folder", "--v1", "--reference_model", reference)
    assert (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.bin").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", use_safetensors=False)
    weights = load_file(file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(pipeline.unet.conv_in.weight, weights[name])


def test_single_files_in_another_dtype_and_container(tmp_path):
    file = make_tiny_sd(tmp_path / "model.safetensors", position_ids=True).path
    convert(file, tmp_path / "small.safetensors", "--fp16", "--save_precision_as", "bf16")
    before, small = load_file(file), load_file(tmp_path / "small.safetensors")
    assert before.keys() == small.keys()
    for name, tensor in before.items():
        expected = tensor.half() if tensor.is_floating_point() else tensor
        assert small[name].dtype == expected.dtype and torch.equal(small[name], expected)
    torch.save({"state_dict": before, "epoch": 3, "global_step": 40}, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "more.ckpt", "--epoch", 2, "--global_step", 10)
    written = torch.load(tmp_path / "more.ckpt", weights_only=True)
    assert (written["epoch"], written["global_step"]) == (5, 50)
    assert same(before, load_pickle(tmp_path / "more.ckpt"))
    convert(tmp_path / "more.ckpt", tmp_path / "again.safetensors")
    assert same(before, load_file(tmp_path / "again.safetensors"))


def test_variants_are_read(tmp_path):
    folder = make_tiny_sd(tmp_path / "folder", layout="diffusers", variant="fp16").path
    convert(folder, tmp_path / "a.safetensors", "--variant", "fp16")
    other = make_tiny_sd(tmp_path / "other", layout="diffusers", seed=1).path
    for part in ("unet", "vae", "text_encoder"):
        for path in (other / part).glob("*.safetensors"):
            shutil.copy(path, folder / part)
    convert(folder, tmp_path / "b.safetensors", "--variant", "fp16")
    convert(folder, tmp_path / "c.safetensors")
    first, variant, plain = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    assert same(first, variant) and not same(first, plain)


def test_what_cannot_be_is_said(tmp_path, capsys):
    file, out = make_tiny_sd(tmp_path / "model.safetensors").path, tmp_path / "out.safetensors"
    assert "exclude each other" in refusal(capsys, file, out, "--v1", "--v2")
    assert "it is Stable Diffusion 1.x" in refusal(capsys, file, out, "--v2")
    assert "no such file or folder" in refusal(capsys, tmp_path / "none.ckpt", out)
    assert "files that are read" in refusal(capsys, file, file)
    assert "must be a dict" in refusal(capsys, file, out, "--metadata", "__import__('os').getcwd()")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "exists already" in refusal(capsys, file, tmp_path / "full")
    assert "has no folder tokenizer" in refusal(capsys, file, tmp_path / "new", "--reference_model", tmp_path)
    assert "only folders have variants" in refusal(capsys, file, out, "--variant", "fp16")
    assert not out.exists()
