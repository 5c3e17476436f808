"""Drawing: equal to diffusers' own pipeline, defined by the seed alone, and without a trace in a training run."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from library.config.image_settings import ImageSettings
from library.diffusion.samplers import SAMPLER_NAMES
from library.errors import UserError
from library.inference.failures import NotFinite, OutOfMemory, naming_memory
from library.inference.generate import encode_texts, generate_image, generate_images, generate_latents, to_image
from library.inference.models import GenerateOptions, ImageModels
from library.inference.prompt_line import SamplePrompt
from library.inference.settings import settings_for
from library.interrupt import Stopped
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd
from tests.inference.conftest import load_models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(np.int16)


# ---- parity ----


@pytest.mark.parametrize("scale", [5.0, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmsolver++"])
def test_equals_diffusers_pipeline(
    folder: MadeCheckpoint,
    models: ImageModels,
    options: GenerateOptions,
    settings: ImageSettings,
    sampler: str,
    scale: float,
) -> None:
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = {
        "ddim": lambda: diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**betas),
        "euler_a": lambda: diffusers.EulerAncestralDiscreteScheduler(**betas),
        "dpmsolver++": lambda: diffusers.DPMSolverMultistepScheduler(**betas),
    }[sampler]()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder.path, scheduler=scheduler, safety_checker=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "width": 64,
        "height": 96,
        "num_inference_steps": 6,
        "guidance_scale": scale,
    }
    expected = pipeline(**arguments, generator=torch.Generator().manual_seed(3), output_type="latent").images
    expected_image = pipeline(**arguments, generator=torch.Generator().manual_seed(3)).images[0]

    settings = replace(settings, height=96, steps=6, scale=scale, sampler=sampler, seed=3)
    latents = generate_latents(models, [settings], options)
    assert latents.shape == (1, 4, 12, 8)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    image = generate_image(models, settings, options)
    assert image.size == (64, 96)
    assert np.abs(pixels(image) - pixels(expected_image)).max() <= 1


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_sampler_runs(models: ImageModels, options: GenerateOptions, settings: ImageSettings, name: str) -> None:
    latents = generate_latents(models, [replace(settings, sampler=name)], options)
    assert latents.shape == (1, 4, 8, 8)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_v2_with_v_prediction_and_zero_terminal_snr(
    tmp_path: Any, options: GenerateOptions, settings: ImageSettings
) -> None:
    made = make_tiny_sd(tmp_path / "v2.safetensors", v2=True)
    models = load_models(made, v2=True, v_parameterization=True)
    options = replace(options, zero_terminal_snr=True)
    assert generate_latents(models, [settings], options).isfinite().all()
    with pytest.raises(UserError, match='"heun" does not support it'):
        generate_image(models, replace(settings, sampler="heun"), options)


# ---- the seed alone ----


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a"])
def test_image_does_not_depend_on_its_batch(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, sampler: str
) -> None:
    batch = [
        replace(settings, sampler=sampler),
        replace(settings, sampler=sampler, prompt="the dog", seed=8),
        replace(settings, sampler=sampler, negative_prompt="", seed=9),
    ]
    together = generate_latents(models, batch, options)
    alone = torch.cat([generate_latents(models, [one], options) for one in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_same_seed_same_image_and_another_seed_another(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    first = pixels(generate_image(models, settings, options))
    torch.manual_seed(99)
    assert np.array_equal(first, pixels(generate_image(models, settings, options)))
    assert not np.array_equal(first, pixels(generate_image(models, replace(settings, seed=8), options)))


@pytest.mark.parametrize(
    "change", [{"prompt": "dog"}, {"negative_prompt": ""}, {"scale": 1.0}, {"scale": -2.0}, {"steps": 4}]
)
def test_every_setting_matters(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, change: dict[str, Any]
) -> None:
    plain = generate_latents(models, [settings], options)
    changed = generate_latents(models, [replace(settings, **change)], options)
    assert (plain - changed).abs().max() > 1e-4


def test_emphasis_and_window(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    def latents(text: str, **more: Any) -> torch.Tensor:
        return generate_latents(models, [replace(settings, prompt=text)], replace(options, **more))

    plain = latents("cat dog")
    assert (plain - latents("(cat:1.5) dog")).abs().max() > 1e-5
    long_text = " ".join(["cat"] * 90)
    assert (latents(long_text) - latents(long_text, max_token_length=150)).abs().max() > 1e-5


def test_texts_are_encoded_once(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    calls = []
    handle = models.text_encoders[0].register_forward_hook(lambda *_: calls.append(1))
    encoded: dict[str, Any] = {}
    for seed in (1, 2):
        batch = [replace(settings, seed=seed), replace(settings, seed=seed + 2)]
        generate_latents(models, batch, options, encoded)
    handle.remove()
    assert len(calls) == 2
    assert set(encoded) == {settings.prompt, settings.negative_prompt}


def test_batches_must_agree(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    with pytest.raises(ValueError, match="must agree"):
        generate_images(models, [settings, replace(settings, steps=5)], options)


# ---- precision ----


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_is_near_float32(
    folder: MadeCheckpoint, models: ImageModels, options: GenerateOptions, settings: ImageSettings, weights: torch.dtype
) -> None:
    exact = generate_latents(models, [settings], options)
    rounded = generate_latents(load_models(folder, weights), [settings], replace(options, dtype=torch.bfloat16))
    assert rounded.dtype == torch.float32
    difference = (exact - rounded).abs().max()
    assert 0 < difference < 0.2
    image = generate_image(load_models(folder, weights), settings, replace(options, dtype=torch.bfloat16))
    assert image.mode == "RGB"


def test_a_vae_that_overflows_is_said(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    """SDXL's VAE overflows in float16."""
    models.vae.decoder.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(NotFinite, match="the VAE gives values that are not finite: try --no_half_vae or bf16"):
        generate_image(models, settings, options)


def test_pixels_to_image() -> None:
    image = to_image(torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 2, 2).expand(3, 2, 2))
    assert pixels(image)[..., 0].tolist() == [[0, 128], [255, 255]]


# ---- settings ----


def test_settings_for() -> None:
    defaults = {"width": 512, "height": 256, "sample_steps": 30, "scale": 7.5}
    settings = settings_for(SamplePrompt("p", width=64, seed=0), defaults, sampler="ddim", seed=5)
    assert settings == ImageSettings("p", "", 64, 256, 30, 7.5, "ddim", 0)
    prompt = SamplePrompt("p", "n", sample_sampler="euler", scale=-1.0)
    assert settings_for(prompt, defaults, sampler="ddim", seed=5) == ImageSettings(
        "p", "n", 512, 256, 30, -1.0, "euler", 5
    )
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    drawn = {settings_for(prompt, defaults, sampler="ddim").seed for _ in range(4)}
    assert len(drawn) > 1
    assert random.getstate() == random_state
    assert torch.equal(torch.get_rng_state(), torch_state)


# ---- no trace ----


def train_lora(folder: MadeCheckpoint, draw_with: ImageSettings | None) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Three steps of LoRA training with dropout, with sample images after each if asked for."""
    from networks import lora

    models = load_models(folder)
    text_encoder, denoiser = models.text_encoders[0], models.denoiser
    torch.manual_seed(1)
    network = lora.create_network(1.0, 4, 4, models.vae, text_encoder, denoiser, neuron_dropout=0.5)
    network.apply_to(text_encoder, denoiser)
    network.train()
    denoiser.train()
    models = replace(models, adapters=[network])
    optimizer = torch.optim.SGD(network.parameters(), lr=10.0)
    images = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        noisy = torch.randn(1, 4, 8, 8, generator=generator)
        tokens = models.architecture.tokenize(models.tokenizers, ["cat"], max_token_length=None, weighted=False)
        conditioning = models.architecture.encode_text(models.text_encoders, tokens, clip_skip=None)
        prediction = models.architecture.predict(denoiser, noisy, torch.tensor([500]), conditioning)
        (prediction - noisy).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if draw_with is not None:
            modes = [module.training for module in [*network.modules(), *denoiser.modules(), *models.vae.modules()]]
            drawing = GenerateOptions(device=torch.device("cpu"))
            drawn = pixels(generate_image(models, draw_with, drawing))
            assert modes == [m.training for m in [*network.modules(), *denoiser.modules(), *models.vae.modules()]]
            assert network.training and denoiser.training and not models.vae.training
            network.eval()
            images.append((drawn, pixels(generate_image(models, draw_with, drawing))))
            network.train()
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}, images


def test_drawing_leaves_no_trace_in_training(folder: MadeCheckpoint, settings: ImageSettings) -> None:
    settings = replace(settings, sampler="euler_a")
    plain, _ = train_lora(folder, None)
    drawn, images = train_lora(folder, settings)
    assert plain.keys() == drawn.keys()
    assert all(torch.equal(plain[name], drawn[name]) for name in plain)
    for drawn_while_training, drawn_without_dropout in images:
        assert np.array_equal(drawn_while_training, drawn_without_dropout)
    assert not np.array_equal(images[0][0], images[-1][0])  # what is drawn is the model of that moment


def test_modes_return_after_an_error(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    models.denoiser.train()
    state = torch.get_rng_state()

    def fail(*_: Any) -> None:
        torch.rand(1)
        raise RuntimeError("out of memory")

    handle = models.denoiser.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_image(models, settings, options)
    handle.remove()
    assert models.denoiser.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.gpu
def test_gpu_draws_the_same_and_parks_the_vae_again(
    folder: MadeCheckpoint, models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    expected = generate_latents(models, [settings], options)
    for module in (*models.text_encoders, models.denoiser):
        module.to("cuda")
    state = torch.cuda.get_rng_state()
    on_gpu = replace(options, device=torch.device("cuda"))
    torch.testing.assert_close(generate_latents(models, [settings], on_gpu).cpu(), expected, rtol=0, atol=5e-3)
    generate_image(models, settings, on_gpu)
    assert next(models.vae.parameters()).device.type == "cpu"
    for encoder in models.text_encoders:
        encoder.to("cpu")  # as beside a cache of their outputs
    torch.testing.assert_close(generate_latents(models, [settings], on_gpu).cpu(), expected, rtol=0, atol=5e-3)
    parked = next(models.text_encoders[0].parameters())
    assert parked.device.type == "cpu" and not parked.is_inference()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for dtype in (torch.float16, torch.bfloat16):
        assert generate_latents(models, [settings], replace(on_gpu, dtype=dtype)).isfinite().all()


def test_prompts_that_are_cut_are_told_of_once(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, caplog: pytest.LogCaptureFixture
) -> None:
    long = replace(settings, prompt="cat " * 76 + "photo of the dog", negative_prompt="dog")
    texts = long.texts(models.architecture.worded)
    for _ in range(2):
        encode_texts(models.architecture, models.tokenizers, models.text_encoders, texts, options)
    assert caplog.text.count("is cut: it has 80 tokens, of which the text encoder reads 75") == 1
    assert 'it loses "cat photo of the dog"' in caplog.text and '"dog" is cut' not in caplog.text


def test_images_decoded_together_are_the_same(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    batch = [replace(settings, seed=seed) for seed in range(3)]
    alone = generate_images(models, batch, options)
    together = generate_images(models, batch, replace(options, vae_batch_size=2))
    assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(alone, together, strict=True))


# ---- failures ----


def test_an_interrupt_ends_it_between_two_steps(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    steps = []

    def check() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        generate_image(models, replace(settings, steps=50), replace(options, check=check))
    assert len(steps) == 3


@torch.no_grad()
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("denoiser", "the weight conv_in.weight of the denoiser holds NaN or infinity; the file is damaged"),
        ("text", "the weight .* of the text encoder 1 holds NaN or infinity"),
        ("vae", "the weight .* of the VAE holds NaN or infinity"),
        ("adapter", "the weight weight of the network bad.safetensors holds NaN"),
        ("scale", "use bf16 or float32 instead of fp16, or a lower scale"),
    ],
)
def test_an_image_that_is_not_finite_is_an_error_with_its_cause(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, broken: str, message: str
) -> None:
    """Instead of a black image."""
    adapter = torch.nn.Linear(1, 1)
    whole = replace(models, adapters=[adapter], adapter_names=["bad.safetensors"])
    part = {"denoiser": models.denoiser, "text": models.text_encoders[0], "vae": models.vae.decoder}.get(broken)
    saved = {}
    if broken == "adapter":
        adapter.weight.fill_(float("nan"))
        saved = {name: p.clone() for name, p in models.denoiser.named_parameters()}
        models.denoiser.register_forward_hook(lambda *_: (torch.full((2, 4, 8, 8), float("nan")),))
    if broken == "scale":
        settings = replace(settings, scale=1e38)
    if part is not None:
        for parameter in [next(p for n, p in part.named_parameters() if p.dim() > 1)]:
            parameter.fill_(float("nan"))
    with pytest.raises(NotFinite, match=message):
        generate_image(whole, settings, options)
    assert all(torch.equal(p, saved[n]) for n, p in models.denoiser.named_parameters() if n in saved)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_a_memory_that_is_too_small_is_one_line(error: BaseException) -> None:
    """The error lets go of what was being computed, so that a session has its memory back."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def compute() -> None:
        held = torch.zeros(1)
        alive.append(weakref.ref(held))
        raise error

    with pytest.raises(OutOfMemory, match="not enough memory for this size; try less") as found:
        with naming_memory("try less"):
            compute()
    assert found.value is not None and alive[0]() is None
    with pytest.raises(RuntimeError, match="other"), naming_memory("try less"):
        raise RuntimeError("other")
