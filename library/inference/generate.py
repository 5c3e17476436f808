"""Generate images from text with any family: for sample images of training and ``gen_img.py``.

Generating leaves no trace in a training run: modules return to their mode and device, and no global random state is
used. Image and noise depend on the seed alone, not on the batch.

Shape legend: B images, C latent channels, (h, w) latent size, (H, W) pixels, T tokens, D features.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture, CaptionLength, Conditioning, SampleFacts
from library.data.caption_lengths import shortened
from library.inference.failures import NotFinite, cause_in
from library.inference.prompt_line import SamplePrompt

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MAX_RANDOM_SEED = 2**32 - 1


@dataclass(frozen=True)
class ImageModels:
    """The models of one family, frozen or in the middle of training.

    Models that a step does not use may be missing: the VAE in ``generate_latents``, all others in ``decode_images``.
    """

    architecture: Architecture
    tokenizers: Sequence[Any] = ()
    text_encoders: Sequence[nn.Module | None] = ()  # None: its outputs are in ``cached_texts``
    denoiser: nn.Module | None = None
    vae: nn.Module | None = None
    v_prediction: bool = False
    adapters: Sequence[nn.Module] = ()  # networks applied to the others, so that their dropout is off, too
    adapter_names: Sequence[str] = ()  # their files, for messages
    #: conditioning by text, for encoders that are not loaded
    cached_texts: Mapping[str, Conditioning] = field(default_factory=dict)

    def modules(self) -> list[nn.Module]:
        models = (*self.text_encoders, self.denoiser, self.vae, *self.adapters)
        return [model for model in models if model is not None]


@dataclass(frozen=True)
class GenerateOptions:
    """Settings of sampling that are the same for all images of a run."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of autocast in text encoders and denoiser; float32: no autocast
    zero_terminal_snr: bool = False
    clip_skip: int | None = None
    max_token_length: int | None = None  # tokens of the text window: 75 (or None), 150 or 225
    weighted: bool = True  # whether (word:1.2) and [word] in prompts are emphasis
    nan_remedy: str = "try --no_half_vae or bf16"  # advice for images that are not finite
    #: called before each denoising step; what it raises ends the generation
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class ImageSettings:
    """Everything that defines one image, besides the models."""

    prompt: str
    negative_prompt: str
    width: int  # pixels
    height: int  # pixels
    steps: int
    scale: float  # classifier-free guidance; 1: none
    sampler: str
    seed: int
    # for families that know them; None: the family's own
    guidance_scale: float | None = None  # embedded guidance
    flow_shift: float | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None

    def record(self, *, model: str, network: str = "") -> dict[str, str]:
        """Return text for ``save_png``; ``model`` and ``network`` are names for people."""
        record = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": str(self.seed),
            "steps": str(self.steps),
            "scale": f"{self.scale:g}",
            "sampler": self.sampler,
            "size": f"{self.width}x{self.height}",
            "model": model,
        }
        own = ("guidance_scale", "flow_shift", "cfg_trunc_ratio", "renorm_cfg")
        record |= {name: f"{getattr(self, name):g}" for name in own if getattr(self, name) is not None}
        return {**record, "network": network} if network else record

    def texts(self) -> tuple[str, ...]:
        """Return the texts to encode."""
        return (self.prompt,) if self.scale == 1.0 else (self.prompt, self.negative_prompt)

    def drawn_with(self, other: ImageSettings) -> bool:
        """Whether both images may share a batch: everything but text and seed is equal."""
        return replace(self, prompt="", negative_prompt="", seed=0) == replace(
            other, prompt="", negative_prompt="", seed=0
        )


def settings_for(
    prompt: SamplePrompt, defaults: Mapping[str, Any], *, sampler: str, seed: int | None = None
) -> ImageSettings:
    """Complete a sample prompt.

    Args:
        prompt: settings that are ``None`` come from the next ones.
        defaults: the family's ``sample_defaults``: ``width``, ``height``, ``sample_steps``, ``scale``.
        sampler: for prompts that name none.
        seed: for prompts that name none; ``None`` draws one, without touching any random state.
    """
    full = prompt.with_defaults(defaults).with_defaults({"sample_sampler": sampler, "seed": seed})
    return ImageSettings(
        prompt=full.prompt,
        negative_prompt=full.negative_prompt or "",
        width=full.width,
        height=full.height,
        steps=full.sample_steps,
        scale=full.scale,
        sampler=full.sample_sampler,
        seed=full.seed if full.seed is not None else random_seed(),
        guidance_scale=full.guidance_scale,
        flow_shift=full.flow_shift,
        cfg_trunc_ratio=full.cfg_trunc_ratio,
        renorm_cfg=full.renorm_cfg,
    )


def random_seed() -> int:
    """Return a seed from the operating system, without using any generator."""
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED)


# ---- images ----


def generate_image(models: ImageModels, settings: ImageSettings, options: GenerateOptions) -> Image:
    """Generate one image.

    Raises:
        UserError: the sampler cannot work with the model.
    """
    return generate_images(models, [settings], options)[0]


def generate_images(
    models: ImageModels,
    batch: Sequence[ImageSettings],
    options: GenerateOptions,
    encoded: dict[str, Conditioning] | None = None,
) -> list[Image]:
    """Generate images in one batch.

    Args:
        models: see there.
        batch: settings that may differ only in text and seed.
        options: see there.
        encoded: encodings by text; missing ones are added. Use another mapping, or none, when the models have changed.

    Raises:
        UserError: the sampler cannot work with the model.
    """
    with undisturbed(models.modules(), options.device):
        return decode_images(models, generate_latents(models, batch, options, encoded), options)


def decode_images(models: ImageModels, latents: Tensor, options: GenerateOptions) -> list[Image]:
    """Decode latents (B, C, h, w) to images."""
    assert models.vae is not None
    with (
        undisturbed([models.vae], options.device),
        _on_device(models.vae, options.device),
        torch.inference_mode(),
    ):
        # one at a time: decoding takes far more memory than sampling
        pixels = [models.architecture.decode_latents(models.vae, latent.unsqueeze(0)) for latent in latents]
    if not all(torch.isfinite(p).all() for p in pixels):
        cause = cause_in({"VAE": models.vae}) or f"the VAE gives values that are not finite: {options.nan_remedy}"
        raise NotFinite(f"no image: {cause}")
    return [to_image(p[0]) for p in pixels]


def generate_latents(
    models: ImageModels,
    batch: Sequence[ImageSettings],
    options: GenerateOptions,
    encoded: dict[str, Conditioning] | None = None,
) -> Tensor:
    """Sample the latents (B, C, h, w), float32, as the denoiser sees them; arguments as ``generate_images``."""
    first = batch[0]
    if not all(first.drawn_with(settings) for settings in batch):
        raise ValueError("images of one batch must agree in all settings but text and seed")
    models = replace(models, architecture=models.architecture.for_image(first))
    objective = models.architecture.objective(
        v_prediction=models.v_prediction, zero_terminal_snr=options.zero_terminal_snr
    )
    latent = models.architecture.latent
    shape = (1, latent.channels, first.height // latent.stride, first.width // latent.stride)
    generators = [torch.Generator(device="cpu").manual_seed(settings.seed) for settings in batch]
    noise = torch.cat([torch.randn(shape, generator=g) for g in generators]).to(options.device)
    scheduler = objective.scheduler(first.sampler, first.steps, shape[2:], options.device)
    encoded = {} if encoded is None else encoded
    with undisturbed(models.modules(), options.device), _precise(options):
        positive = _sized(models, _encode(models, [settings.prompt for settings in batch], options, encoded), first)
        if first.scale == 1.0:
            predict = _plain(models, positive)
        else:
            negative = _encode(models, [settings.negative_prompt for settings in batch], options, encoded)
            predict = _guided(models, positive, _sized(models, negative, first), first.scale)
        latents = sample(
            scheduler, lambda x, t: objective.for_sampler(predict(x, t), t), noise, generators, options.check
        )
        if not torch.isfinite(latents).all():
            raise NotFinite(f"no image: {_why_not_finite(models, positive)}")
        return latents


def sample(
    scheduler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    generators: Sequence[torch.Generator],
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run a diffusers scheduler from noise to latents.

    Args:
        scheduler: with its timesteps set.
        predict: (B, C, h, w) and timesteps (B,) to the model's prediction (B, C, h, w).
        noise: (B, C, h, w), standard normal.
        generators: one for each image; samplers that add noise draw from them.
        check: called before each step; what it raises ends the sampling.
    """
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if draws else {}
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        check()
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = predict(scaled, timestep.expand(len(latents)))
        latents = scheduler.step(prediction.float(), timestep, latents, return_dict=False, **extra)[0]
    return latents


def _why_not_finite(models: ImageModels, conditioning: Conditioning) -> str:
    """In the order of the computation: weights, what the encoders give, and else the precision."""
    networks = dict(zip((f"network {name}" for name in models.adapter_names), models.adapters, strict=False))
    encoders = {f"text encoder {n}": encoder for n, encoder in enumerate(models.text_encoders, start=1)}
    found = cause_in({**networks, **encoders, "denoiser": models.denoiser}, {"text encoder": conditioning.tensors})
    return found or "the denoiser's values are not finite: use bf16 or float32 instead of fp16, or a lower scale"


def _plain(models: ImageModels, positive: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda noisy, timesteps: models.architecture.predict(models.denoiser, noisy, timesteps, positive)


def _guided(
    models: ImageModels, positive: Conditioning, negative: Conditioning, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance, both predictions in one pass (Ho & Salimans 2022, arXiv:2207.12598, eq. 6)."""
    both = Conditioning.cat([negative, positive])

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        # (B, C, h, w) -> (2B, C, h, w)
        prediction = models.architecture.predict(
            models.denoiser, torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both
        ).float()
        without, with_prompt = prediction.chunk(2)
        return without + scale * (with_prompt - without)

    return predict


def _encode(
    models: ImageModels, texts: Sequence[str], options: GenerateOptions, encoded: dict[str, Conditioning]
) -> Conditioning:
    """Text to conditioning (B, T, D), each distinct text once and by itself, whatever shares its batch."""
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
    """Conditioning by text, as images are drawn with, ahead of drawing."""
    with undisturbed(text_encoders, options.device), _precise(options):
        return _encode_each(architecture, tokenizers, text_encoders, texts, options)


def _encode_each(
    architecture: Architecture,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module | None],
    texts: Sequence[str],
    options: GenerateOptions,
) -> dict[str, Conditioning]:
    """Texts, one by one, to the outputs of the encoders that are there."""
    found = {}
    with contextlib.ExitStack() as fetched:
        for encoder in text_encoders if texts else ():
            if encoder is not None:
                fetched.enter_context(_on_device(encoder, options.device))
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
    """Once for each prompt, as sample images have the same ones again and again."""
    logger.warning(
        'prompt "%s" is cut: it has %d tokens, of which the text encoder reads %d; it loses "%s"',
        *(shortened(text), length.tokens, length.limit, shortened(length.cut)),
    )


def _sized(models: ImageModels, conditioning: Conditioning, settings: ImageSettings) -> Conditioning:
    """As for a whole image of just this size."""
    count = len(next(iter(conditioning.tensors.values())))
    facts = SampleFacts.of_whole_images(settings.width, settings.height, count)
    return models.architecture.condition(conditioning, facts, None)


def to_image(pixels: Tensor) -> Image:
    """(3, H, W) in [-1, 1] to an 8-bit RGB image; what is not a number becomes black."""
    from PIL import Image

    levels = ((pixels.float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())  # (3, H, W) -> (H, W, 3)


# ---- leaving no trace ----


@contextlib.contextmanager
def _precise(options: GenerateOptions) -> Iterator[None]:
    """The precision that images are drawn in, without gradients."""
    enabled = options.dtype != torch.float32
    with torch.inference_mode(), torch.autocast(options.device.type, dtype=options.dtype, enabled=enabled):
        yield


@contextlib.contextmanager
def undisturbed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules in eval mode meanwhile, each back in its own mode after; global generators as they were."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module that may be elsewhere (such as a VAE in host memory) to ``device`` within the context."""
    parameter = next(module.parameters(), None)
    home = parameter.device if parameter is not None else device
    if home == device:
        yield
        return
    # weights that were moved in inference mode could not be moved again outside of it
    with torch.inference_mode(False):
        module.to(device)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            module.to(home)
