"""Models that miss layers, and files with tensors that no model takes, are not loaded in silence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.common import clip, expected, t5
from library.architectures.flux.sizes import _check_depth
from library.architectures.sd import SD
from library.errors import UserError
from tests.fixtures.tiny_sd import make_tiny_sd


@pytest.fixture(autouse=True)
def said_anew() -> None:
    expected._warn.cache_clear()


def inspect(path: Path, *, v2: bool = False) -> object:
    return SD.inspect(
        str(path), v2=v2, v_parameterization=False, vae=None, tokenizer_cache_dir=str(path.parent / "tokenizers")
    )


def without(path: Path, beginning: str) -> Path:
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(beginning)}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    return path


@pytest.mark.parametrize(
    ("beginning", "words"),
    [
        ("model.diffusion_model.output_blocks.3.", "the U-Net has 3 output blocks where 4 are expected"),
        ("model.diffusion_model.input_blocks.3.", "the U-Net has 4 output blocks where"),
        ("first_stage_model.decoder.up.3.", "the VAE has 3 levels in its decoder where 4 are expected"),
    ],
)
def test_a_last_block_is_missing(tmp_path: Path, beginning: str, words: str) -> None:
    path = without(make_tiny_sd(tmp_path / "tiny.safetensors").path, beginning)
    with pytest.raises(UserError, match=words) as found:
        inspect(path)
    assert str(path) in str(found.value)


@pytest.mark.parametrize(("width", "layers", "fits"), [(768, 12, True), (768, 11, False), (1280, 32, True),
                                                        (1280, 31, False), (1024, 23, True), (768, 13, False),
                                                        (32, 2, True)])  # fmt: skip
def test_clip_of_published_widths(width: int, layers: int, fits: bool) -> None:
    shapes = {
        "embeddings.token_embedding.weight": (49408, width),
        "embeddings.position_embedding.weight": (77, width),
        **{f"encoder.layers.{n}.mlp.fc1.weight": (4 * width, width) for n in range(layers)},
    }
    if fits:
        assert clip.infer_clip_config(shapes, prefix="", activation="gelu")["num_hidden_layers"] == layers
    else:
        with pytest.raises(UserError, match=rf"has {layers} layers, and those of its width \({width}\) have"):
            clip.infer_clip_config(shapes, prefix="", activation="gelu")


def test_t5_of_published_width() -> None:
    shapes = {
        "shared.weight": (32128, 4096),
        t5._BIAS: (32, 64),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
        **{f"encoder.block.{n}.layer.0.SelfAttention.q.weight": (4096, 4096) for n in range(24)},
    }
    assert t5.infer_t5_config(shapes)["num_layers"] == 24
    del shapes["encoder.block.23.layer.0.SelfAttention.q.weight"]
    with pytest.raises(UserError, match="T5 encoder has 23 layers"):
        t5.infer_t5_config(shapes)


@pytest.mark.parametrize(("depth", "fits"), [((19, 38), True), ((8, 38), True), ((18, 38), False), ((19, 37), False),
                                             ((7, 38), False), ((12, 20), True)])  # fmt: skip
def test_flux_of_published_width(depth: tuple[int, int], fits: bool) -> None:
    _check_depth(64, depth)
    if fits:
        _check_depth(3072, depth)
    else:
        with pytest.raises(UserError, match="the file is incomplete"):
            _check_depth(3072, depth)


@pytest.mark.parametrize("v2", [False, True])
def test_published_files_hold_nothing_unknown(tmp_path: Path, v2: bool, caplog: pytest.LogCaptureFixture) -> None:
    made = make_tiny_sd(tmp_path / "tiny.safetensors", v2=v2, position_ids=not v2)
    checkpoint = inspect(made.path, v2=v2)
    with caplog.at_level(logging.WARNING):
        for load in (SD.load_denoiser, SD.load_vae, SD.load_text_encoders):
            load(checkpoint, dtype=torch.float32, device="cpu")
    assert not caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        "model.diffusion_model.input_blocks.1.0.adapter.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc3.weight",
        "first_stage_model.decoder.mid.attn_2.q.weight",
    ],
)
def test_tensors_that_no_model_takes_are_named(tmp_path: Path, extra: str, caplog: pytest.LogCaptureFixture) -> None:
    made = make_tiny_sd(tmp_path / "tiny.safetensors")
    others = {"first_stage_model.loss.discriminator.weight": torch.ones(2), "model_ema.decay": torch.ones(())}
    save_file({**load_file(made.path), extra: torch.ones(2, 2), **others}, made.path)
    checkpoint = inspect(made.path)
    with caplog.at_level(logging.WARNING):
        for device in ("meta", "cpu"):
            for load in (SD.load_denoiser, SD.load_vae, SD.load_text_encoders):
                load(checkpoint, dtype=torch.float32, device=device)
    assert caplog.text.count("that it does not use") == 1
    assert extra in caplog.text
