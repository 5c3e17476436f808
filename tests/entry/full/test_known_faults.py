"""Faults of the predecessor in training whole models, beside those that other tests of this folder are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from library.training.kinds.full import Full
from tests.fixtures.runs import logged, make_images, metadata_of, write_dataset
from tests.fixtures.tiny_flux import make_tiny_flux
from tests.fixtures.whole import Whole


def test_the_data_set_is_shown(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """--debug_dataset failed in most scripts."""
    fine_tune.train(dataset, tmp_path, debug_dataset=True)
    assert not list(tmp_path.glob("*.safetensors"))


def test_images_that_are_held_out_are_validated_on(tmp_path: Path, fine_tune: Whole, images: Path) -> None:
    """validation_split only removed images."""
    data = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2\nvalidation_split = 0.4")
    fine_tune.train(data, tmp_path, validate_every_n_steps=1)
    assert logged(tmp_path, "loss/validation/step_average")


def test_counters_of_pickles_count_from_one(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """The epoch was counted from 0 in saves by steps and at the end."""
    fine_tune.train(dataset, tmp_path, save_model_as="ckpt", save_every_n_steps=1, max_train_steps=2)
    for name, steps in (("tiny-step00000001", 1), ("tiny", 2)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert (saved["epoch"], saved["global_step"]) == (1, steps)


def test_folders_have_the_precision_that_was_asked_for(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """--save_precision was ignored for folders."""
    options = {"save_model_as": "diffusers_safetensors", "save_precision": "fp16", "max_train_steps": 1}
    fine_tune.train(dataset, tmp_path, **options)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (tmp_path / "tiny" / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} - {torch.int64} == {torch.float16}, part


def test_alpha_masks_act_alone(tmp_path: Path, sdxl_train: Whole) -> None:
    """They acted only beside --masked_loss or an option that weighs timesteps."""
    images = make_images(tmp_path / "images", [(64, 64)] * 2)
    for path in images.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        Image.fromarray(np.dstack([pixels, np.zeros((64, 64), np.uint8)])).save(path)
    data = write_dataset(tmp_path / "data.toml", images, subset="alpha_mask = true")
    sdxl_train.train(data, tmp_path)
    assert logged(tmp_path, "loss/current") == [0.0, 0.0]


def test_regularization_images_have_their_weight(tmp_path: Path, sdxl_train: Whole) -> None:
    """They weighed as much as any other image."""
    own, reg = (make_images(tmp_path / name, [(64, 64)] * 2) for name in ("own", "reg"))
    more = f"[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true\nclass_tokens = 'cat'"
    data = write_dataset(tmp_path / "data.toml", own, subset=more)
    sdxl_train.train(data, tmp_path, prior_loss_weight=0, max_train_steps=4)
    losses = logged(tmp_path, "loss/current")
    assert len(losses) == 4 and losses.count(0.0) == 2


def test_the_vae_is_exact_without_a_cache_too(
    tmp_path: Path, train_db: Whole, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--no_half_vae acted only while latents were cached."""
    family, seen = type(train_db.family.architecture), set()
    encode = family.encode_images

    def spy(self: Any, vae: nn.Module, *args: Any) -> Tensor:
        hook = vae.encoder.conv_in.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        try:
            return encode(self, vae, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(family, "encode_images", spy)
    for folder, exact in (("half", False), ("exact", True)):
        seen.clear()
        train_db.train(dataset, tmp_path / folder, mixed_precision="bf16", no_half_vae=exact, max_train_steps=1)
        assert seen == {torch.float32 if exact else torch.bfloat16}


def test_schnell_is_called_by_its_name(tmp_path: Path, flux_train: Whole, dataset: Path) -> None:
    """It was recorded as FLUX.1 dev."""
    made = make_tiny_flux(tmp_path / "model", model="schnell")
    Whole("flux_train", flux_train.family, made).train(dataset, tmp_path, max_train_steps=1)
    assert metadata_of(tmp_path / "tiny.safetensors")["modelspec.architecture"] == "flux-1-schnell"


def test_timesteps_are_not_rounded(
    tmp_path: Path, whole: Whole, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has one number for 998 and 999; with all weights in it, the model still sees two timesteps."""
    seen: list[tuple[torch.dtype, bool]] = []
    predict = Full.predict

    def spy(self: Full, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, *args: Any) -> Tensor:
        with torch.no_grad():
            one, other = (predict(self, denoiser, noisy, torch.full_like(timesteps, at), *args) for at in (998, 999))
        seen.append((timesteps.dtype, torch.equal(one, other)))
        return predict(self, denoiser, noisy, timesteps, *args)

    monkeypatch.setattr(Full, "predict", spy)
    half = {"full_bf16": True, "mixed_precision": "bf16"}
    whole.train(dataset, tmp_path, **half, optimizer_type="SGD", max_train_steps=1)
    ((dtype, same),) = seen
    assert dtype in (torch.int64, torch.float32) and not same


def test_no_encoder_has_a_dropout_of_its_own(sd3_train: Whole) -> None:
    """T5 ran with its dropout of 0.1 where it was not cached."""
    family, made = sd3_train.family.architecture, sd3_train.model
    checkpoint = family.inspect(str(made.path), vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir))  # type: ignore[attr-defined]
    encoders = [encoder.train() for encoder in family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")]
    tokens = family.tokenize(family.load_tokenizers(checkpoint), ["a cat"], max_token_length=None, weighted=False)
    one, other = (family.encode_text(encoders, tokens, clip_skip=None).tensors for _ in range(2))
    assert "t5_out" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_encoders_are_dropped_from_cached_variants(tmp_path: Path, sd3_train: Whole, images: Path) -> None:
    """All tags are kept, so that the variants are one caption and the run is the one without a cache."""
    data = write_dataset(
        tmp_path / "data.toml", images, dataset="batch_size = 2", subset="shuffle_caption = true\nkeep_tokens = 9"
    )
    rates = {"clip_l_dropout_rate": 0.5, "clip_g_dropout_rate": 0.5, "t5_dropout_rate": 0.5}
    cached = {"cache_text_encoder_outputs": True, "text_encoder_cache_variants": 3}
    found = {}
    for name, options in (("live", rates), ("cached", {**rates, **cached}), ("whole", cached)):
        sd3_train.train(data, tmp_path / name, **options)
        found[name] = load_file(tmp_path / name / "tiny.safetensors")
    assert all(torch.equal(tensor, found["live"][name]) for name, tensor in found["cached"].items())
    assert any(not torch.equal(tensor, found["whole"][name]) for name, tensor in found["cached"].items())
