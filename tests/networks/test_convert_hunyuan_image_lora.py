"""``convert_hunyuan_image_lora_to_comfy.py``: names there and back, hashes, and files of other kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.files.hashes import sshs_hashes
from networks import convert_hunyuan_image_lora_to_comfy as tool
from tests.fixtures.layouts import table


def converted(*words: object) -> int:
    return tool.main(tool.setup_parser().parse_args([str(word) for word in words]))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The names of a published file, with small tensors."""
    names = sorted(table("lora_hunyuan_image"))
    state = {name: torch.full((1,), 1.0 + place) for place, name in enumerate(names)}
    metadata = {"ss_base_model_version": "hunyuan-image-2.1", "ss_network_dim": "4", "sshs_model_hash": "old"}
    save_file(state, tmp_path / "lora.safetensors", metadata)
    return tmp_path / "lora.safetensors"


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "comfyui.safetensors", tmp_path / "back.safetensors"
    assert converted(source, there) == 0 and "renamed 480 of 960 tensors" in capsys.readouterr().out
    names = load_file(there).keys()
    assert len(names) == 960 and not any(part in name for name in names for part in ("_fc1", "_fc2", "_linear."))
    for name in (
        "lora_unet_double_blocks_0_img_mlp_0.alpha", "lora_unet_double_blocks_19_txt_mlp_2.lora_up.weight",
        "lora_unet_double_blocks_3_txt_mod_lin.lora_down.weight", "lora_unet_single_blocks_39_modulation_lin.alpha",
        "lora_unet_single_blocks_0_linear1.alpha", "lora_unet_double_blocks_0_img_attn_qkv.alpha",
    ):  # fmt: skip
        assert name in names
    entries = metadata_of(there)
    recorded = {name: text for name, text in entries.items() if name.startswith("ss_")}
    assert entries["sshs_model_hash"] == sshs_hashes(load_file(there), recorded)[0]
    assert entries["ss_network_dim"] == "4"
    assert converted("--reverse", there, back) == 0
    first, last = load_file(source), load_file(back)
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    assert converted(there, tmp_path / "again.safetensors") == 1
    assert "already has ComfyUI's names" in capsys.readouterr().err
    assert not (tmp_path / "again.safetensors").exists()


def test_a_file_without_metadata_gets_none(source: Path, tmp_path: Path) -> None:
    save_file(load_file(source), tmp_path / "bare.safetensors")
    assert converted(tmp_path / "bare.safetensors", tmp_path / "out.safetensors") == 0
    assert not any(name.startswith("ss_") for name in metadata_of(tmp_path / "out.safetensors"))


@pytest.mark.parametrize(
    ("state", "metadata", "text"),
    [
        ({"lora_unet_double_blocks_0_img_mlp_0.alpha": torch.ones(1)}, {"ss_base_model_version": "flux1"}, "flux1"),
        ({"lora_te1_text_model.alpha": torch.ones(1)}, {}, "not a LoRA of HunyuanImage-2.1"),
    ],
)
def test_files_of_other_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: dict, metadata: dict, text: str
) -> None:
    save_file(state, tmp_path / "other.safetensors", metadata)
    with pytest.raises(SystemExit):
        converted(tmp_path / "other.safetensors", tmp_path / "out.safetensors")
    assert text in capsys.readouterr().err
