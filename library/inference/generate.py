"""Generate images from text with any family: for sample images of training and ``gen_img.py``.

Generating leaves no trace in a training run: modules return to their mode and device, and no global random state is
used. Image and noise depend on the seed alone, not on the batch.

Shape legend: B images, C latent channels, (h, w) latent size, (H, W) pixels, T tokens, D features.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.conditioning import CaptionLength, Conditioning, SampleFacts
from library.config.image_settings import ImageSettings
from library.config.prompt_options import TextRole
from library.data.caption_lengths import shortened
from library.inference.denoise import Feature, Generation, run
from library.inference.failures import NotFinite, cause_in
from library.inference.features import feature
from library.inference.models import GenerateOptions, ImageModels
from library.memory.placing import stage

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


# ---- images ----


def generate_image(
    models: ImageModels, settings: ImageSettings, options: GenerateOptions, features: Sequence[Feature] = ()
) -> Image:
    """Generate one image.

    Raises:
        UserError: the sampler cannot work with the model.
    """
    return generate_images(models, [settings], options, features=features)[0]


def generate_images(
    models: ImageModels,
    batch: Sequence[ImageSettings],
    options: GenerateOptions,
    encoded: dict[str, Conditioning] | None = None,
    features: Sequence[Feature] = (),
) -> list[Image]:
    """Generate images in one batch.

    Args:
        models: see ``ImageModels``.
        batch: settings; only text and seed may differ.
        options: see ``GenerateOptions``.
        encoded: encodings by text; missing ones are added. Use another mapping, or none, when the models have changed.

    Raises:
        UserError: the sampler cannot work with the model.
    """
    with undisturbed(models.modules(), options.device):
        return decode_images(models, generate_latents(models, batch, options, encoded, features), options)


def decode_images(models: ImageModels, latents: Tensor, options: GenerateOptions) -> list[Image]:
    """Decode latents (B, C, h, w) to images."""
    assert models.vae is not None
    with (
        undisturbed([models.vae], options.device),
        stage(options.device, models.vae),
        torch.inference_mode(),
    ):
        # one at a time by default: decoding takes far more memory than sampling
        parts = latents.split(options.vae_batch_size)
        pixels = [image for part in parts for image in models.architecture.decode_latents(models.vae, part).split(1)]
    if not all(torch.isfinite(p).all() for p in pixels):
        cause = cause_in({"VAE": models.vae}) or f"the VAE gives values that are not finite: {options.nan_remedy}"
        raise NotFinite(f"no image: {cause}")
    return [to_image(p[0]) for p in pixels]


def generate_latents(
    models: ImageModels,
    batch: Sequence[ImageSettings],
    options: GenerateOptions,
    encoded: dict[str, Conditioning] | None = None,
    features: Sequence[Feature] = (),
) -> Tensor:
    """Sample the latents (B, C, h, w), float32, as the denoiser sees them; arguments as ``generate_images``."""
    first = batch[0]
    if not all(first.shares_batch_with(settings) for settings in batch):
        raise ValueError("images of one batch must agree in all settings but text and seed")
    models = replace(models, architecture=models.architecture.for_image(first))
    with undisturbed(models.modules(), options.device), _precise(options):
        generation = begin(models, batch, options, {} if encoded is None else encoded)
        positive = generation.conditioning
        guidance = feature(models.architecture.guidance)()
        latents = run(generation, sorted([guidance, *features], key=lambda one: one.order))
        if not torch.isfinite(latents).all():
            raise NotFinite(f"no image: {_why_not_finite(models, positive)}")
        return latents


def begin(
    models: ImageModels,
    batch: Sequence[ImageSettings],
    options: GenerateOptions,
    encoded: dict[str, Conditioning],
) -> Generation:
    """Return a generation that starts from noise, towards the prompts."""
    first, latent = batch[0], models.architecture.latent
    objective = models.architecture.objective(
        v_prediction=models.v_prediction, zero_terminal_snr=options.zero_terminal_snr
    )
    shape = (1, latent.channels, first.height // latent.stride, first.width // latent.stride)
    generators = [torch.Generator(device="cpu").manual_seed(settings.seed) for settings in batch]
    noise = torch.cat([torch.randn(shape, generator=g) for g in generators]).to(options.device)
    scheduler = objective.scheduler(first.sampler, first.steps, shape[2:], options.device)
    if options.zero_steps_offset and getattr(scheduler.config, "steps_offset", 0) != 0:
        scheduler.register_to_config(steps_offset=0)
        scheduler.set_timesteps(first.steps, device=options.device)

    def encode(texts: Sequence[str], negative: bool = False) -> Conditioning:
        role: TextRole = "negative" if negative else "prompt"
        texts = [models.architecture.worded(text, role) for text in texts]
        return _sized(models, _encode(models, texts, options, encoded), first, negative=negative)

    def encode_afresh(texts: Sequence[str], negative: bool = False) -> Conditioning:
        return _sized(models, _encode(models, texts, options, {}), first, negative=negative)

    return Generation(
        models=models,
        settings=batch,
        options=options,
        objective=objective,
        encode=encode,
        encode_afresh=encode_afresh,
        conditioning=encode([settings.prompt for settings in batch]),
        scheduler=scheduler,
        generators=generators,
        noise=noise,
        latents=noise * scheduler.init_noise_sigma,
        timesteps=scheduler.timesteps,
    )


def _why_not_finite(models: ImageModels, conditioning: Conditioning) -> str:
    """Return why latents are not finite, in the order of the computation: weights, text encodings, or the precision."""
    networks = dict(zip((f"network {name}" for name in models.adapter_names), models.adapters, strict=False))
    encoders = {f"text encoder {n}": encoder for n, encoder in enumerate(models.text_encoders, start=1)}
    found = cause_in({**networks, **encoders, "denoiser": models.denoiser}, {"text encoder": conditioning.tensors})
    return found or "the denoiser's values are not finite: use bf16 or float32 instead of fp16, or a lower scale"


def _encode(
    models: ImageModels, texts: Sequence[str], options: GenerateOptions, encoded: dict[str, Conditioning]
) -> Conditioning:
    """Return the conditioning (B, T, D) of texts; each distinct text is encoded once and alone, whatever its batch."""
    encoders, missing = models.text_encoders, [text for text in dict.fromkeys(texts) if text not in encoded]
    if any(encoder is not None for encoder in encoders):
        found = _encode_each(models.architecture, models.tokenizers, encoders, missing, options)
    else:
        found = {text: Conditioning({}) for text in missing}
    for text, fresh in found.items():
        cached = models.cached_texts.get(text, Conditioning({})).to(options.device)
        encoded[text] = Conditioning({**cached.tensors, **fresh.tensors})
    return Conditioning.cat([encoded[text] for text in texts])


def encode_texts(
    architecture: Architecture,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module],
    texts: Sequence[str],
    options: GenerateOptions,
) -> dict[str, Conditioning]:
    """Return text -> conditioning, encoded before images are generated.

    Args:
        texts: as ``worded`` gives them.
    """
    with undisturbed(text_encoders, options.device), _precise(options):
        return _encode_each(architecture, tokenizers, text_encoders, texts, options)


def _encode_each(
    architecture: Architecture,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module | None],
    texts: Sequence[str],
    options: GenerateOptions,
) -> dict[str, Conditioning]:
    """Encode texts, one by one, with the loaded encoders."""
    found = {}
    with stage(options.device, *(text_encoders if texts else ())):
        for text in texts:
            length = architecture.caption_length(
                tokenizers, text, max_token_length=options.max_token_length, weighted=options.weighted
            )
            if length.cut:
                _warn_of_cut(text, length)
            tokens = architecture.tokenize(
                tokenizers, [text], max_token_length=options.max_token_length, weighted=options.weighted
            )
            tokens = {name: tensor.to(options.device) for name, tensor in tokens.items()}
            found[text] = architecture.encode_text(text_encoders, tokens, clip_skip=options.clip_skip)
    return found


@functools.cache
def _warn_of_cut(text: str, length: CaptionLength) -> None:
    """Warn once for each prompt, because sample images repeat their prompts."""
    logger.warning(
        'prompt "%s" is cut: it has %d tokens, of which the text encoder reads %d; it loses "%s"',
        *(shortened(text), length.tokens, length.limit, shortened(length.cut)),
    )


def _sized(models: ImageModels, conditioning: Conditioning, settings: ImageSettings, *, negative: bool) -> Conditioning:
    """Add the sizes that the settings give, or those of a whole image of just this size."""
    height, width = settings.height, settings.width
    original = [settings.original_height or height, settings.original_width or width]
    if negative:
        original = [settings.original_height_negative or original[0], settings.original_width_negative or original[1]]
    count = len(next(iter(conditioning.tensors.values())))
    facts = SampleFacts(
        original=torch.tensor([original]).expand(count, 2),
        top_left=torch.tensor([[settings.crop_top or 0, settings.crop_left or 0]]).expand(count, 2),
        target=torch.tensor([[height, width]]).expand(count, 2),
    )
    return models.architecture.condition(conditioning, facts, None)


def to_image(pixels: Tensor) -> Image:
    """Convert (3, H, W) in [-1, 1] to an 8-bit RGB image; NaN becomes black."""
    from PIL import Image

    levels = ((pixels.float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())  # (3, H, W) -> (H, W, 3)


# ---- leaving no trace ----


@contextlib.contextmanager
def _precise(options: GenerateOptions) -> Iterator[None]:
    """Return a context with the precision of image generation, without gradients."""
    enabled = options.dtype != torch.float32
    with torch.inference_mode(), torch.autocast(options.device.type, dtype=options.dtype, enabled=enabled):
        yield


@contextlib.contextmanager
def undisturbed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Put modules in eval mode, and restore each one's mode and the global random generators afterwards."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
