"""Run ``flux_minimal_inference.py``: check every file, encode, sample, decode, save."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor, nn

from library.architectures.base import Conditioning
from library.architectures.common.checkpoint import MODEL_FLAG
from library.architectures.flux import FLUX, Flux
from library.architectures.flux.inspection import FluxCheckpoint
from library.architectures.flux.options import FluxModelOptions
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.diffusion.objective import FLOW_SAMPLERS
from library.errors import UserError
from library.inference.adapter_files import adapt, open_adapters, read_choice
from library.inference.failures import OutOfMemory, naming_memory
from library.inference.file_names import FileNames, try_folder
from library.inference.flux_options import SIZE_STEP, FluxInferenceOptions, FluxImageOptions, PartDtype, part_dtypes
from library.inference.generate import decode_images, encode_texts, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from library.inference.settings import ImageSettings, random_seed
from library.inference.parts import Parts
from library.inference.plan import PlannedImage, Repetition, plan_images
from library.inference.png import save_png
from library.inference.prompt_line import ImagePrompt, parse_flux_prompt
from library.memory.fp8 import store_in_fp8
from library.memory.host_heap import keep_freed_memory

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

TEXT, DENOISER, VAE = "text encoders", "transformer", "autoencoder"
_MEMORY_REMEDY = "try a smaller one, or --offload"
#: texts of a session whose encodings are kept; each takes 8 MB
KEPT_TEXTS = 16


def draw_images(options: FluxInferenceOptions, lines: TextIO | None = None) -> list[Path]:
    """Generate the prompt of the command line, or with ``--interactive`` prompts from the keyboard.

    Args:
        options: accepted by ``check_options``.
        lines: source of prompts; default is the keyboard.

    Returns:
        the files, in the order they were written.

    Raises:
        UserError: wrong or missing files; errors of typed prompts are printed, and the next prompt is read.
    """
    setup_console(ConsoleOptions())
    studio = ImageSession(options)
    if not options.image.interactive:
        if re.search(r"\s--[a-z]", options.image.prompt):
            logger.warning("--prompt is taken as it is; options within a prompt are read with --interactive only")
        with naming_memory(_MEMORY_REMEDY):
            return [studio.draw(ImagePrompt(options.image.prompt))]
    if options.image.prompt != FluxImageOptions.prompt:
        logger.warning("--prompt has no effect with --interactive, which reads prompts from the keyboard")
    return _session(studio, lines or sys.stdin)


def _session(studio: ImageSession, lines: TextIO) -> list[Path]:
    written = []
    for number, line in enumerate(_typed(lines), start=1):
        where = f"prompt {number}"
        try:
            prompt = parse_flux_prompt(line, where=where, size_step=SIZE_STEP)
            with naming_memory(_MEMORY_REMEDY):
                written.append(studio.draw(prompt))
        except OutOfMemory as error:
            studio.free()
            logger.error("%s: %s", where, error)
        except UserError as error:
            logger.error("%s", error)
        except KeyboardInterrupt:
            logger.info("%s: stopped", where)
            break
    return written


def _typed(lines: TextIO) -> Iterator[str]:
    """Yield lines up to the first empty one, the end of the file, or Ctrl-C.

    They are read as bytes, as a text stream would drop all that it has read ahead at the first wrong byte.
    """
    source = getattr(lines, "buffer", lines)
    while True:
        if lines.isatty():
            print("prompt (an empty line ends): ", end="", file=sys.stderr, flush=True)
        try:
            raw = source.readline()
        except KeyboardInterrupt:
            return
        try:
            line = (raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw).strip()
        except UnicodeDecodeError:
            logger.error("the line is no UTF-8 text")
            continue
        if not line:
            return
        yield line


@dataclass(frozen=True)
class _Dtype:
    """Torch's form of ``PartDtype``."""

    compute: torch.dtype
    is_fp8: bool

    @staticmethod
    def of(part: PartDtype) -> _Dtype:
        return _Dtype(getattr(torch, part.compute), part.is_fp8)


class ImageSession:
    """A model that is ready to generate. No weights are read before the first image.

    Args:
        options: accepted by ``check_options``.

    Raises:
        UserError: files that are missing, damaged or of other models; all are checked here.
    """

    def __init__(self, options: FluxInferenceOptions) -> None:
        self._options = options
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        named = part_dtypes(options.precision)
        self._dtypes = {name: _Dtype.of(dtype) for name, dtype in named.items()}
        self._checkpoint, self._family = _inspect(options)
        logger.info("model: %s, %s", self._checkpoint.path, self._checkpoint.info.description)
        shown = {name: dtype for name, dtype in named.items() if name != "clip_l" or not self._family.is_chroma}
        logger.info("on %s in %s", self._device, ", ".join(f"{name} {dtype}" for name, dtype in shown.items()))
        self._common = _common_settings(options, self._family, self._checkpoint.info.description)
        # names and shapes of the whole model: every file is checked before the first weight is read
        self._outlines = self._load_outlines()
        choices = [read_choice(text, "--lora_weights") for text in options.networks.lora_weights]
        self._adapters = open_adapters(choices, *self._outlines)
        self._strengths = [file.strength for file in self._adapters]
        self._tokenizers = self._family.load_tokenizers(self._checkpoint)
        offload = options.precision.offload
        if self._device.type == "cpu" and not offload:
            keep_freed_memory()  # not if memory must be freed
        loaders = {TEXT: self._load_text_encoders, DENOISER: self._load_denoiser, VAE: self._load_vae}
        self._parts = Parts(loaders, one_at_a_time=offload, device=self._device)
        self._encoded: dict[str, Conditioning] = {}
        try_folder(Path(options.image.output_dir))
        self._files = FileNames(Path(options.image.output_dir))

    # ---- drawing ----

    def draw(self, prompt: ImagePrompt) -> Path:
        """Generate an image of one prompt and save it.

        Raises:
            UserError: strengths (``--m``) that fit no adapters; the file cannot be written.
        """
        planned = self._plan(prompt)
        settings = planned.settings
        self._set_strengths(planned.multipliers)
        self._encode(settings)
        image = self._decode(self._sample(settings))
        path = self._files.next(settings.seed)
        strengths = zip(self._adapters, self._strengths, strict=True)
        network = ", ".join(f"{file.path.name}:{strength:g}" for file, strength in strengths)
        save_png(image, path, settings.record(model=Path(self._checkpoint.path).name, network=network))
        logger.info("image: %s (seed %d)", path, settings.seed)
        return path

    # each step drops its models, so that the next one can use their memory

    def _encode(self, settings: ImageSettings) -> None:
        known = [text for text in settings.texts() if text in self._encoded]
        self._encoded |= {text: self._encoded.pop(text) for text in known}  # the most recently used come last
        texts = [text for text in settings.texts() if text not in self._encoded]
        if not texts:
            return
        encoders, _ = self._parts.get(TEXT)
        # without autocast: each text encoder computes in its own dtype, which need not be the transformer's
        drawing = self._drawing(torch.float32)
        for text, found in encode_texts(self._family, self._tokenizers, encoders, texts, drawing).items():
            self._encoded[text] = found.to(self._device, torch.float32)
        for text in list(self._encoded)[:-KEPT_TEXTS]:
            del self._encoded[text]

    def _sample(self, settings: ImageSettings) -> Tensor:
        denoiser, _ = self._parts.get(DENOISER)
        models = ImageModels(self._family, denoiser=denoiser)
        return generate_latents(models, [settings], self._drawing(self._dtypes["flux"].compute), self._encoded)

    def _decode(self, latents: Tensor) -> Image:
        models = ImageModels(self._family, vae=self._parts.get(VAE))
        return decode_images(models, latents, self._drawing(torch.float32))[0]

    def _drawing(self, autocast: torch.dtype) -> GenerateOptions:
        remedy = "try --ae_dtype float32, or --dtype bfloat16"
        return GenerateOptions(self._device, autocast, weighted=False, nan_remedy=remedy)

    def free(self) -> None:
        """Free the memory of all models; they are loaded again when they are needed."""
        self._parts.free()

    def _plan(self, prompt: ImagePrompt) -> PlannedImage:
        if prompt.guidance_scale is not None and not self._family.takes_guidance:
            logger.warning("--g has no effect with %s", self._checkpoint.info.description)
            prompt = replace(prompt, guidance_scale=None)
        seed = self._options.image.seed
        (planned,) = plan_images([prompt], self._common, Repetition(random_seed() if seed is None else seed))
        if planned.settings.negative_prompt and planned.settings.scale == 1.0:
            logger.warning("the negative prompt has no effect at CFG scale 1; set --cfg_scale (--c in a prompt)")
        return planned

    def _set_strengths(self, given: Sequence[float]) -> None:
        """Set the strengths of the prompt, and of the command line for the remaining files."""
        if given and self._options.networks.merge_lora_weights:
            raise UserError("--m: strengths are fixed with --merge_lora_weights; leave that out to change them")
        if len(given) > len(self._adapters):
            raise UserError(f"--m: {len(given)} strengths for {len(self._adapters)} files of --lora_weights")
        wanted = [*given, *(file.strength for file in self._adapters[len(given) :])]
        changed = [file for file, old, new in zip(self._adapters, self._strengths, wanted, strict=True) if old != new]
        if any(file.adapts_text for file in changed):
            self._encoded.clear()
        self._strengths = wanted
        for loaded in self._parts.loaded:
            networks = loaded[1] if isinstance(loaded, tuple) else ()
            for network, strength in zip(networks, wanted, strict=False):
                if network is not None:
                    network.set_multiplier(strength)

    # ---- loading ----

    def _load_outlines(self) -> tuple[list[nn.Module], nn.Module]:
        """Load text encoders and transformer without weights."""
        encoders = self._family.load_text_encoders(self._checkpoint, dtype=torch.float32, device="meta")
        self._family.load_vae(self._checkpoint, dtype=torch.float32, device="meta")
        return encoders, self._family.load_denoiser(self._checkpoint, dtype=torch.float32, device="meta")

    def _load_text_encoders(self) -> tuple[list[nn.Module], list[nn.Module | None]]:
        names = ("clip_l", "t5xxl")[-len(self._checkpoint.text_encoders) :]
        dtypes = [self._dtypes[name] for name in names]
        encoders = []
        for place, dtype in enumerate(dtypes):  # each in its own dtype
            others = [other != place for other in range(len(dtypes))]
            device = self._loading_device(dtype)
            loaded = self._family.load_uncached_text_encoders(
                self._checkpoint, others, dtype=dtype.compute, device=device
            )
            encoders.append(loaded[place])
        return encoders, self._finished(encoders, dtypes, encoders, self._outlines[1])

    def _load_denoiser(self) -> tuple[nn.Module, list[nn.Module | None]]:
        dtype = self._dtypes["flux"]
        denoiser = self._family.load_denoiser(self._checkpoint, dtype=dtype.compute, device=self._loading_device(dtype))
        return denoiser, self._finished([denoiser], [dtype], self._outlines[0], denoiser)

    def _load_vae(self) -> nn.Module:
        return self._family.load_vae(self._checkpoint, dtype=self._dtypes["ae"].compute, device=str(self._device))

    def _loading_device(self, dtype: _Dtype) -> str:
        """Return the device to load to: fp8 weights are made on the host, layer by layer, so that the device never
        holds more."""
        return "cpu" if dtype.is_fp8 else str(self._device)

    def _finished(
        self, models: Sequence[nn.Module], dtypes: Sequence[_Dtype], encoders: Sequence[nn.Module], denoiser: nn.Module
    ) -> list[nn.Module | None]:
        """Convert loaded models, move them to the device and apply their adapters; returns the applied networks."""
        merge = self._options.networks.merge_lora_weights

        def adapted() -> list[nn.Module | None]:
            is_text = models is encoders
            return adapt(
                self._adapters, self._strengths, encoders, denoiser, text=is_text, merge=merge, device=self._device
            )

        networks = adapted() if merge else []  # nothing can be merged into fp8
        for model, dtype in zip(models, dtypes, strict=True):
            if dtype.is_fp8:
                store_in_fp8(model, self._device)
        return networks if merge else adapted()


# ---- before loading ----


def _inspect(options: FluxInferenceOptions) -> tuple[FluxCheckpoint, Flux]:
    given = options.files
    family = FLUX.changed(
        FluxModelOptions,
        model_type=given.model_type,
        clip_l=given.clip_l,
        t5xxl=given.t5xxl,
        ae=given.ae,
        apply_t5_attn_mask=given.apply_t5_attn_mask,
    )
    try:
        checkpoint = family.inspect(given.ckpt_path or "", tokenizer_cache_dir=given.tokenizer_cache_dir)
    except UserError as error:
        # families' messages use the flags and scripts of training
        text = str(error).replace(MODEL_FLAG, "--ckpt_path")
        text = re.sub(r"use \w*train_network\.py", "only FLUX.1 and Chroma are supported here", text)
        raise UserError(text.replace("with --network_weights", "with --lora_weights")) from None
    if len(checkpoint.text_encoders) == 1:
        for name, value in (("clip_l", given.clip_l), ("clip_l_dtype", options.precision.clip_l_dtype)):
            if value:
                logger.warning("--%s has no effect with %s", name, checkpoint.info.description)
    family = family.for_model(checkpoint)
    # the command line's guidance comes with each image, if the model takes one
    return checkpoint, family.changed(
        FluxModelOptions, guidance_scale=family.sample_defaults.get("guidance_scale", 0.0)
    )


def _common_settings(options: FluxInferenceOptions, family: Flux, model: str) -> ImageSettings:
    image = options.image
    if not family.takes_guidance and image.guidance not in (FluxImageOptions.guidance, 0.0):
        logger.warning("--guidance %g has no effect with %s", image.guidance, model)
    return ImageSettings(
        prompt="",
        negative_prompt=image.negative_prompt or "",
        width=image.width,
        height=image.height,
        steps=family.drawing_steps if image.steps is None else image.steps,
        scale=image.cfg_scale,
        sampler=FLOW_SAMPLERS[0],
        seed=0,
        guidance_scale=image.guidance if family.takes_guidance else None,
    )
