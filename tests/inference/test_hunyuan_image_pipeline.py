"""Whole sampling of HunyuanImage-2.1 equals diffusers' pipeline, from the same weights, texts and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.architectures.hunyuan_image import HUNYUAN_IMAGE
from library.architectures.hunyuan_image.options import HunyuanOptions
from library.config.image_settings import ImageSettings
from library.inference.features.projected_guidance import ProjectedGuidance, orthogonal, rescaled
from library.inference.generate import decode_images, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.architectures.hunyuan_image.test_model import theirs as diffusers_transformer
from tests.fixtures.tiny_hunyuan_image import HunyuanFileSizes, MadeHunyuan, make_tiny_hunyuan

WIDTH, HEIGHT, STEPS = 128, 64, 5
#: the last step of plain guidance, for prompts with and without quoted text
START, START_OCR = 1, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHunyuan:
    sizes = HunyuanFileSizes(glyphs_inner=2048)  # which is fixed in diffusers
    return make_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan"), sizes=sizes)


@pytest.fixture(scope="module")
def models(made: MadeHunyuan) -> ImageModels:
    family = HUNYUAN_IMAGE.changed(HunyuanOptions, text_encoder=str(made.text_encoder), byt5=str(made.byt5))
    checkpoint = family.inspect(str(made.path), vae=str(made.vae), tokenizer_cache_dir=str(made.tokenizer_cache_dir))
    return ImageModels(
        family,
        tokenizers=family.load_tokenizers(checkpoint),
        text_encoders=family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu"),
        denoiser=family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"),
        vae=family.load_vae(checkpoint, dtype=torch.float32, device="cpu"),
    )


def whole_qwen(made: MadeHunyuan) -> nn.Module:
    """The whole of Qwen2.5-VL in transformers, with the file's weights and a visual part that is not used."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = HunyuanFileSizes()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": sizes.qwen_vocabulary, "hidden_size": sizes.context, "intermediate_size": sizes.qwen_inner,
            "num_hidden_layers": sizes.qwen_layers, "num_attention_heads": 2, "num_key_value_heads": sizes.key_heads,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256},
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    state = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(made.text_encoder).items()
        if not name.startswith("visual.")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(".visual." in name for name in missing)
    return model


@pytest.mark.parametrize(
    ("prompt", "scale", "rescale"),
    [
        ("a photo of the cat", 3.5, 0.0),
        ('a photo of the cat with the text "dog" and \u201ccat\u201d', 3.5, 0.3),
        ("a photo of the cat", 1.0, 0.0),
    ],
    ids=["guided", "quoted, rescaled", "unguided"],
)
def test_equals_diffusers_pipeline(
    made: MadeHunyuan, models: ImageModels, prompt: str, scale: float, rescale: float
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    def guider(start: int) -> AdaptiveProjectedMixGuidance:
        return AdaptiveProjectedMixGuidance(
            guidance_scale=scale, guidance_rescale=rescale, adaptive_projected_guidance_start_step=start
        )

    pipeline = HunyuanImagePipeline(
        transformer=diffusers_transformer(models.denoiser).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=models.vae,
        text_encoder=whole_qwen(made),
        tokenizer=models.tokenizers[0],
        text_encoder_2=models.text_encoders[1],
        tokenizer_2=models.tokenizers[1],
        guider=guider(START),
        ocr_guider=guider(START_OCR),
    )
    pipeline.set_progress_bar_config(disable=True)
    settings = ImageSettings(
        prompt, "red dog", WIDTH, HEIGHT, STEPS, scale, "euler", seed=3,
        own={
            "apg_start_step_general": START, "apg_start_step_ocr": START_OCR, "guidance_rescale": rescale,
            "guidance_rescale_apg": rescale,
        },
    )  # fmt: skip
    found = {}
    for name, kind in (("latents", "latent"), ("image", "pil")):
        with torch.no_grad():
            found[name] = pipeline(
                settings.prompt,
                negative_prompt=settings.negative_prompt,
                width=WIDTH,
                height=HEIGHT,
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(3),
                output_type=kind,
            ).images
    options = GenerateOptions(torch.device("cpu"))
    latents = generate_latents(models, [settings], options)
    torch.testing.assert_close(latents, found["latents"], rtol=0, atol=1e-4)
    (image,) = decode_images(models, latents, options)
    difference = np.asarray(image).astype(int) - np.asarray(found["image"][0]).astype(int)
    assert np.abs(difference).max() <= 1


def test_the_images_of_a_batch_are_those_of_single_ones(models: ImageModels) -> None:
    """Captions of different lengths, and one of them with quoted text: padding changes nothing, nor does the order."""
    own = {"apg_start_step_general": 0, "apg_start_step_ocr": 2}
    prompts = ("a cat", 'a photo of the dog and a background with the text "cat"')
    batch = [
        ImageSettings(prompt, "", WIDTH, HEIGHT, 3, 3.5, "euler", seed=seed, own=own)
        for seed, prompt in enumerate(prompts)
    ]
    options = GenerateOptions(torch.device("cpu"))
    together = generate_latents(models, batch, options)
    alone = torch.cat([generate_latents(models, [settings], options) for settings in batch])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_what_is_orthogonal_and_rescaled() -> None:
    torch.manual_seed(0)
    x, to = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    assert abs(float((orthogonal(x, to) * to).sum())) < 1e-4
    assert float(rescaled(3 * x, to, 1.0).std()) == pytest.approx(float(to.std()), rel=1e-5)
    assert rescaled(x, to, 0.0) is x
    assert ProjectedGuidance().wrap(len) is len  # no guidance was prepared
