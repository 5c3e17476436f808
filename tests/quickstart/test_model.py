"""The embedded model: its size, its layout, and whether it draws what a prompt says."""

from __future__ import annotations

import pytest
import torch

from examples.quickstart.recipe.images import CONCEPT
from examples.quickstart.recipe.measure_accuracy import WANTED, asked_scenes, load_models, measure
from library.architectures.sd import SD
from library.inference.models import ImageModels
from tests.fixtures.runs import ROOT

MODEL = ROOT / "examples" / "quickstart" / "model"
MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def models() -> ImageModels:
    return load_models(MODEL)


def test_size() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= MAX_BYTES


def test_is_a_diffusers_folder_of_sd1_in_half_precision() -> None:
    from library.files.safetensors_io import read_header

    found = SD.inspect(str(MODEL), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=None)
    assert not found.info.v_prediction
    for part in ("unet", "vae"):
        header = read_header(MODEL / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in header.tensors.values()} == {"F16"}
    names = read_header(MODEL / "text_encoder" / "model.safetensors").tensors
    assert all(name.startswith("text_model.") for name in names)


def test_diffusers_own_pipeline_reads_it() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    image = pipeline(
        "a red circle", num_inference_steps=2, height=64, width=64, generator=None, output_type="np"
    ).images
    assert image.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("text", [f"a {CONCEPT} on the left, white background", "Größe 漢字 \N{SNOWMAN}!", "x" * 300])
def test_tokenizer_encodes_any_text(models: ImageModels, text: str) -> None:
    tokenizer = models.tokenizers[0]
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.lower().replace(" ", "")


def test_draws_what_the_prompt_says(models: ImageModels) -> None:
    # the figure of all 200 prompts is measure_accuracy's, see the test below
    assert measure(models, asked_scenes(50)).both >= WANTED


@pytest.mark.slow
def test_two_hundred_prompts(models: ImageModels) -> None:
    assert measure(models, asked_scenes(200)).both >= WANTED
