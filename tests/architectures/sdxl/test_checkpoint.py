"""Checkpoints are recognized; messages name files and flags that do not fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.sdxl import SDXL
from library.architectures.sdxl.checkpoint import SDXLCheckpoint
from library.errors import UserError
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.fixtures.tiny_sdxl import SdxlSizes, make_tiny_sdxl

UNET = "model.diffusion_model.input_blocks.0.0.weight"


def inspect(made: MadeCheckpoint | Path, *, cache: Path | None = None, **flags) -> SDXLCheckpoint:
    path, found = (made.path, made.tokenizer_cache_dir) if isinstance(made, MadeCheckpoint) else (made, cache)
    settings = {"v_parameterization": False, "vae": None, "tokenizer_cache_dir": found and str(found)} | flags
    return SDXL.inspect(str(path), **settings)


def without(made: MadeCheckpoint, prefix: str) -> MadeCheckpoint:
    save_file({k: t for k, t in load_file(made.path).items() if not k.startswith(prefix)}, made.path)
    return made


def test_records_and_tokenizers(tmp_path: Path) -> None:
    made = make_tiny_sdxl(tmp_path / "model.safetensors")
    checkpoint = inspect(made)
    assert (checkpoint.info.family, checkpoint.info.v_prediction) == ("sdxl", False)
    assert SDXL.metadata(checkpoint.info) == {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}
    assert SDXL.modelspec(checkpoint.info)["default_resolution"] == "1024x1024"
    folder = make_tiny_sdxl(tmp_path / "folder", layout="diffusers")
    assert inspect(folder).tokenizer_folders == (folder.path / "tokenizer", folder.path / "tokenizer_2")


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_prediction_flag_that_contradicts_the_model(tmp_path: Path, layout: str) -> None:
    suffix = ".safetensors" if layout == "ldm" else ""
    made = make_tiny_sdxl(tmp_path / f"v{suffix}", layout=layout, v_prediction=True)
    assert inspect(made, v_parameterization=True).info.v_prediction
    where = r'its tensor "v_pred"' if layout == "ldm" else "scheduler/scheduler_config.json"
    with pytest.raises(UserError, match=rf"is trained for v_prediction \({where}\); add --v_parameterization"):
        inspect(made)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cond_stage_model.transformer.x", UNET], "is a Stable Diffusion 1.x or 2.x checkpoint; use train_network.py"),
        (["conditioner.embedders.0.model.x", "model.diffusion_model.label_emb.0.0.weight"], "refiner"),
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "FLUX.*flux_train_network.py"),
        (["lora_unet_mid_block.lora_down.weight"], "LoRA file.*--network_weights"),
        (["something.else"], "is not a Stable Diffusion XL checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors.*{message}"):
        inspect(tmp_path / "other.safetensors")


def test_other_folders_are_named(tmp_path: Path) -> None:
    made = make_tiny_sd(tmp_path / "folder", layout="diffusers")
    with pytest.raises(UserError, match="Stable Diffusion 1.x or 2.x model .*; use train_network.py"):
        inspect(made)
    (made.path / "model_index.json").unlink()
    with pytest.raises(UserError, match="text_encoder_2/config.json is missing"):
        inspect(made)


def test_incomplete_files_say_what_is_missing(tmp_path: Path) -> None:
    made = make_tiny_sdxl(tmp_path / "model.safetensors")
    whole = made.path.read_bytes()
    with pytest.raises(UserError, match="has no VAE; give one with --vae"):
        inspect(without(made, "first_stage_model."))
    other = make_tiny_sdxl(tmp_path / "other.safetensors", seed=5)
    loaded = SDXL.load_vae(inspect(made, vae=str(other.path)), dtype=torch.float32, device="cpu")
    assert torch.equal(loaded.quant_conv.weight, load_file(other.path)["first_stage_model.quant_conv.weight"])
    with pytest.raises(UserError, match="has no first text encoder and no second text encoder; give a whole"):
        inspect(without(made, "conditioner."))
    made.path.write_bytes(whole)
    with pytest.raises(UserError, match="text_projection is missing"):
        inspect(without(made, "conditioner.embedders.1.model.text_projection"))


def test_models_that_do_not_go_together(tmp_path: Path) -> None:
    made = make_tiny_sdxl(tmp_path / "one", layout="diffusers")
    wide = make_tiny_sdxl(tmp_path / "wide", layout="diffusers", sizes=SdxlSizes(width_2=96))
    shutil.rmtree(made.path / "text_encoder_2")
    shutil.copytree(wide.path / "text_encoder_2", made.path / "text_encoder_2")
    with pytest.raises(UserError, match="the U-Net takes text of width 96, the text encoders give 128 together"):
        inspect(made)
    inpainting = SdxlSizes(replace(SdxlSizes().base, in_channels=9))
    with pytest.raises(UserError, match="inpainting.*9 channels.*plain Stable Diffusion XL"):
        inspect(make_tiny_sdxl(tmp_path / "inpainting.safetensors", sizes=inpainting))


def test_identities_follow_what_they_are_of(tmp_path: Path) -> None:
    made = make_tiny_sdxl(tmp_path / "model.safetensors")
    vae, text = SDXL.vae_identity(inspect(made)), SDXL.text_identity(inspect(made)).weights
    tensors = load_file(made.path)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, made.path)
    assert (SDXL.vae_identity(inspect(made)), SDXL.text_identity(inspect(made)).weights) == (vae, text)
    tensors["conditioner.embedders.1.model.text_projection"] += 1
    save_file(tensors, made.path)
    assert SDXL.vae_identity(inspect(made)) == vae and SDXL.text_identity(inspect(made)).weights != text


def test_hub_repository_fetches_both_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    made = make_tiny_sdxl(tmp_path / "snapshot", layout="diffusers")
    used = {str(p.relative_to(made.path)) for p in made.path.rglob("*") if p.is_file()}
    files = [SimpleNamespace(rfilename=name) for name in sorted(used | {"sd_xl_base_1.0.safetensors", "unet/x.onnx"})]
    asked: list[list[str]] = []

    def fetch(_repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(made.path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert inspect(Path("owner/model")).path == str(made.path)
    assert set(asked[0]) == used
