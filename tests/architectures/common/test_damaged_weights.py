"""Weights that would train in silence are refused where they are loaded, by file and tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.base import Architecture
from library.architectures.sd import SD
from library.errors import UserError
from tests.fixtures.tiny_sd import make_tiny_sd

#: by part: one of the file's tensors
TENSORS = {
    "denoiser": "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
    "vae": "first_stage_model.decoder.mid.attn_1.q.weight",
    "text": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
}


def load(path: Path, cache: Path, part: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> object:
    family: Architecture = SD
    checkpoint = family.inspect(str(path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=str(cache))
    loaders = {"denoiser": family.load_denoiser, "vae": family.load_vae, "text": family.load_text_encoders}
    return loaders[part](checkpoint, dtype=dtype, device=device)


def damaged(folder: Path, name: str, change: object) -> tuple[Path, Path]:
    """A tiny checkpoint with one tensor changed, and where its tokenizer lies."""
    made = make_tiny_sd(folder / "tiny.safetensors")
    tensors = load_file(made.path)
    tensors[name] = change(tensors[name])
    save_file(tensors, made.path)
    return made.path, made.tokenizer_cache_dir


def with_one(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize("part", TENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, part: str, value: float) -> None:
    path, cache = damaged(tmp_path, TENSORS[part], with_one(value))
    with pytest.raises(UserError, match="holds NaN or infinity; the file is damaged") as found:
        load(path, cache, part)
    assert str(path) in str(found.value) and TENSORS[part] in str(found.value)
    for other in TENSORS.keys() - {part}:
        load(path, cache, other)
    load(path, cache, part, device="meta")  # which reads no weights


def test_what_a_narrow_type_cannot_hold(tmp_path: Path) -> None:
    path, cache = damaged(tmp_path, TENSORS["denoiser"], with_one(1e5))
    load(path, cache, "denoiser", torch.bfloat16)
    with pytest.raises(UserError, match="does not fit in float16, whose largest number is 65504"):
        load(path, cache, "denoiser", torch.float16)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_integers_among_weights(tmp_path: Path, dtype: torch.dtype, device: str) -> None:
    path, cache = damaged(tmp_path, TENSORS["denoiser"], lambda tensor: tensor.to(dtype))
    with pytest.raises(UserError, match=f"holds {str(dtype)[6:]} numbers, which are not weights") as found:
        load(path, cache, "denoiser", device=device)
    assert TENSORS["denoiser"] in str(found.value)


def test_pickled_files_too(tmp_path: Path) -> None:
    path, cache = damaged(tmp_path, TENSORS["vae"], with_one(float("nan")))
    pickled = path.with_suffix(".ckpt")
    torch.save({"state_dict": load_file(path)}, pickled)
    with pytest.raises(UserError, match=r"tiny\.ckpt: the tensor .* of the VAE holds NaN"):
        load(pickled, cache, "vae")
