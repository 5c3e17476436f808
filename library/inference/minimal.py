"""Generate images with one model at a time in memory: shared by the families' minimal inference scripts.

A family's script opens a model (``library/architectures/minimal_inference.py``); everything else is here: check every
file, encode, sample, decode, save.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn

from library.architectures.conditioning import Conditioning
from library.architectures.minimal_inference import ImageRequest, MinimalInference, ModelPart, OpenedModel
from library.architectures.whole_models import SavedModel
from library.config.image_settings import ImageSettings
from library.diffusion.objective import FLOW_SAMPLERS
from library.errors import UserError
from library.files.streamed import check_target
from library.inference import latent_files
from library.inference.adapter_files import adapt, open_adapters, read_choice
from library.inference.failures import naming_memory
from library.inference.file_names import FileNames, try_folder
from library.inference.generate import decode_images, encode_texts, generate_latents
from library.inference.interactive import generate_lines
from library.inference.messages import for_images
from library.inference.models import GenerateOptions, ImageModels
from library.inference.parts import Parts
from library.inference.plan import PlannedImage, Repetition, plan_images
from library.inference.png import save_png
from library.inference.prompt_file import read_minimal_prompts
from library.inference.prompt_line import ImagePrompt, parse_minimal_prompt
from library.inference.settings import random_seed
from library.memory.block_stream import stream_blocks, swapped_counts
from library.memory.stored_layers import store_weights

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

TEXT, DENOISER, VAE = "text encoders", "denoiser", "autoencoder"
MEMORY_REMEDY = "try a smaller one, or --offload"
#: number of texts whose encodings a session keeps; each takes 8 MB
KEPT_TEXTS = 16


class ImageSession:
    """A model that is ready to generate. No weights are read before the first image.

    Args:
        model: its files are checked here.
        request: of the script's command line.

    Raises:
        UserError: files that are missing, damaged or of other models; all are checked here.
    """

    def __init__(self, inference: MinimalInference, model: OpenedModel, request: ImageRequest) -> None:
        self._inference = inference
        self._model = model
        self._request = request
        self._common = _common_settings(model, request)
        self._device = _device(request.device)
        self._text_device = torch.device("cpu") if model.encodes_on_host else self._device
        self._checkpoint, self._family = model.checkpoint, model.family
        logger.info("model: %s, %s", self._checkpoint.path, self._checkpoint.info.description)
        dtypes = (*model.encoders, model.denoiser, model.vae)
        logger.info("on %s in %s", self._device, ", ".join(f"{part.name} {part.dtype}" for part in dtypes))
        # names and shapes of the whole model: every file is checked before the first weight is read
        self._outlines = self._load_outlines()
        choices = [read_choice(text, inference.lora_flag) for text in request.lora_weights]
        self._adapters = open_adapters(choices, *self._outlines, patterns=request.lora_patterns)
        self._blocks = self._family.block_lists(self._outlines[1])
        if request.blocks_to_swap:
            swapped_counts([len(blocks) for blocks in self._blocks], request.blocks_to_swap)
        self._strengths = [file.strength for file in self._adapters]
        self._tokenizers = self._family.load_tokenizers(self._checkpoint)
        loaders = {TEXT: self._load_text_encoders, DENOISER: self._load_denoiser, VAE: self._load_vae}
        self._parts = Parts(loaders, one_at_a_time=request.offload, device=self._device)
        self._encoded: dict[str, Conditioning] = {}
        try_folder(Path(request.output_dir))
        self._files = FileNames(Path(request.output_dir))

    def read_prompt(self, line: str, where: str) -> ImagePrompt:
        """Parse one typed line. Raises UserError: a mistake in it, named with ``where`` it is."""
        own = (*self._family.declaration.prompt_options, *self._inference.prompt_options)
        return parse_minimal_prompt(line, where=where, size_step=self._inference.size_step, options=own)

    # ---- generating ----

    def generate_typed(self, line: str, where: str) -> list[Path]:
        """Generate one typed prompt; raises UserError as ``generate``."""
        return [self.generate(self.read_prompt(line, where))]

    def generate(self, prompt: ImagePrompt) -> Path:
        """Generate an image of one prompt and save it.

        Raises:
            UserError: strengths (``--m``) that fit no adapters; the file cannot be written.
        """
        planned = self._plan(prompt)
        settings = planned.settings
        self._set_strengths(planned.multipliers)
        self._encode(settings)
        latents = self._sample(settings)
        name = self._request.image_file
        path = self._files.named(name) if name else self._files.next(settings.seed)
        strengths = zip(self._adapters, self._strengths, strict=True)
        network = ", ".join(f"{file.path.name}:{strength:g}" for file, strength in strengths)
        record = settings.record(model=Path(self._checkpoint.path).name, network=network)
        if "latent" in self._request.saves:
            path = latent_files.write(path.with_suffix(latent_files.SUFFIX), latents, record)
            logger.info("latents: %s (seed %d)", path, settings.seed)
        if "image" not in self._request.saves:
            return path
        return self._save(latents, path.with_suffix(".png"), record)

    def decode_file(self, file: Path) -> Path:
        """Decode a file of latents that was saved before, and save the image.

        Raises:
            UserError: it is no such file, or of another family.
        """
        latents, record = latent_files.read(file, self._family.latent.channels)
        return self._save(latents.to(self._device), self._files.named(self._request.image_file or file.stem), record)

    def _save(self, latents: Tensor, path: Path, record: Mapping[str, str]) -> Path:
        save_png(self._decode(latents), path, record if self._request.with_metadata else {})
        logger.info("image: %s (seed %s)", path, record.get("seed", "unknown"))
        return path

    def save_merged(self, path: Path) -> Path:
        """Save the denoiser with its adapters merged into it."""
        denoiser, _ = self._parts.get(DENOISER)
        self._family.write(path, self._checkpoint, {"denoiser": denoiser}, SavedModel("safetensors"))
        logger.info("merged model: %s", path)
        return path

    # each step drops its models, so that the next one can use their memory

    def _encode(self, settings: ImageSettings) -> None:
        worded = self._family.for_image(settings).worded
        wanted = list(dict.fromkeys(settings.texts(worded)))  # prompt and negative prompt may be the same
        known = [text for text in wanted if text in self._encoded]
        self._encoded |= {text: self._encoded.pop(text) for text in known}  # the most recently used are last
        texts = [text for text in wanted if text not in self._encoded]
        if not texts:
            return
        encoders, _ = self._parts.get(TEXT)
        # without autocast: each text encoder computes in its own dtype, which need not be the denoiser's
        how = replace(self._how(torch.float32), device=self._text_device)
        for text, found in encode_texts(self._family, self._tokenizers, encoders, texts, how).items():
            self._encoded[text] = found.to(self._device, torch.float32)
        for text in list(self._encoded)[:-KEPT_TEXTS]:
            del self._encoded[text]

    def _sample(self, settings: ImageSettings) -> Tensor:
        denoiser, _ = self._parts.get(DENOISER)
        models = ImageModels(self._family, denoiser=denoiser, v_prediction=self._checkpoint.info.v_prediction)
        return generate_latents(models, [settings], self._how(_compute(self._model.denoiser)), self._encoded)

    def _decode(self, latents: Tensor) -> Image:
        models = ImageModels(self._family, vae=self._parts.get(VAE))
        return decode_images(models, latents, self._how(torch.float32))[0]

    def _how(self, autocast: torch.dtype) -> GenerateOptions:
        return GenerateOptions(self._device, autocast, weighted=False, nan_remedy=self._inference.nan_remedy)

    def free(self) -> None:
        """Free the memory of all models; they are loaded again when they are needed."""
        self._parts.free()

    def _plan(self, prompt: ImagePrompt) -> PlannedImage:
        if prompt.guidance_scale is not None and self._common.guidance_scale is None:
            logger.warning("--g has no effect with %s", self._checkpoint.info.description)
            prompt = replace(prompt, guidance_scale=None)
        seed = self._request.seed
        (planned,) = plan_images([prompt], self._common, Repetition(random_seed() if seed is None else seed))
        if planned.settings.negative_prompt and planned.settings.scale == 1.0:
            flag = self._inference.flags.get("scale", "scale")
            logger.warning("the negative prompt has no effect at CFG scale 1; set --%s (--c in a prompt)", flag)
        return planned

    def _set_strengths(self, given: Sequence[float]) -> None:
        """Set the strengths of the prompt, and of the command line for the remaining files."""
        if given and self._request.merge_lora_weights:
            raise UserError("--m: strengths are fixed with --merge_lora_weights; leave that out to change them")
        if len(given) > len(self._adapters):
            raise UserError(
                f"--m: {len(given)} strengths for {len(self._adapters)} files of {self._inference.lora_flag}"
            )
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
        """Load text encoders and denoiser without weights."""
        encoders = self._family.load_text_encoders(self._checkpoint, dtype=torch.float32, device="meta")
        self._family.load_vae(self._checkpoint, dtype=torch.float32, device="meta")
        return encoders, self._family.load_denoiser(self._checkpoint, dtype=torch.float32, device="meta")

    def _load_text_encoders(self) -> tuple[list[nn.Module], list[nn.Module | None]]:
        parts = self._model.encoders
        encoders = []
        for place, part in enumerate(parts):  # each in its own dtype
            device = self._loading_device(part, self._text_device)
            encoder = self._family.load_text_encoder(self._checkpoint, place, dtype=_compute(part), device=device)
            self._model.prepare(f"text_encoder_{place + 1}", encoder)
            encoders.append(encoder)
        return encoders, self._finished(encoders, parts, encoders, self._outlines[1], self._text_device)

    def _load_denoiser(self) -> tuple[nn.Module, list[nn.Module | None]]:
        part, swapped = self._model.denoiser, self._request.blocks_to_swap
        place = "cpu" if swapped else self._loading_device(part, self._device)
        denoiser = self._family.load_denoiser(self._checkpoint, dtype=_compute(part), device=place)
        self._model.prepare("denoiser", denoiser)
        home = "cpu" if swapped else None
        networks = self._finished([denoiser], [part], self._outlines[0], denoiser, self._device, home=home)
        if swapped:  # after everything that changes whole weights
            stream_blocks(denoiser, self._family.block_lists(denoiser), swapped, self._device)
        return denoiser, networks

    def _load_vae(self) -> nn.Module:
        vae = self._family.load_vae(self._checkpoint, dtype=_compute(self._model.vae), device=str(self._device))
        self._model.prepare("vae", vae)
        return vae

    @staticmethod
    def _loading_device(part: ModelPart, device: torch.device) -> str:
        """Return the device to load to.

        fp8 weights are made on the host, layer by layer, so that the device never holds more.
        """
        return "cpu" if part.dtype.is_fp8 else str(device)

    def _finished(
        self,
        models: Sequence[nn.Module],
        parts: Sequence[ModelPart],
        encoders: Sequence[nn.Module],
        denoiser: nn.Module,
        device: torch.device,
        home: str | None = None,
    ) -> list[nn.Module | None]:
        """Convert loaded models, move them to the device and apply their adapters; returns the applied networks.

        Args:
            home: where converted models are kept, if not on the device.
        """
        merge = self._request.merge_lora_weights or self._request.merged_file is not None

        def adapted() -> list[nn.Module | None]:
            is_text = models is encoders
            return adapt(self._adapters, self._strengths, encoders, denoiser, text=is_text, merge=merge, device=device)

        networks = adapted() if merge else []  # nothing can be merged into fp8
        for model, part in zip(models, parts, strict=True):
            if part.dtype.is_fp8:
                blocks = self._family.block_lists(model) if model is denoiser else ()
                store_weights(model, part.form, device, home=home, blocks=blocks)
        return networks if merge else adapted()


def _device(name: str | None) -> torch.device:
    """Return the device of ``--device``; None for the GPU, if there is one. Raises UserError: there is none of it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: there is no such device here; use cpu, or cuda with a GPU") from None
    return device


def _compute(part: ModelPart) -> torch.dtype:
    return getattr(torch, part.dtype.compute)


def _common_settings(model: OpenedModel, request: ImageRequest) -> ImageSettings:
    """Return the settings that a prompt does not give: those of the request, then the model's own."""
    given = {name: value for name, value in request.settings.items() if value is not None}
    plain = ImageSettings("", "", width=0, height=0, steps=0, scale=1.0, sampler=FLOW_SAMPLERS[0], seed=0)
    return plain.changed({**model.settings, **given})


def generate_for(inference: MinimalInference, options: Any, lines: TextIO) -> list[Path]:
    """Generate the prompt of a script's command line, or with ``--interactive`` prompts that are typed.

    Args:
        options: of the script, checked.
        lines: source of typed prompts.

    Returns:
        the files, in the order they were written.

    Raises:
        UserError: wrong or missing files; errors of typed prompts are printed, and the next prompt is read.
    """
    request = inference.request(options)
    if not request.interactive and re.search(r"\s--[a-z]", request.prompt):
        logger.warning("--prompt is taken as it is; options within a prompt are read with --interactive only")
    latents = [Path(file) for file in request.latent_files]
    model = open_model(inference, options)
    if request.merged_file is not None:
        sources = [Path(model.checkpoint.path), *(read_choice(t, inference.lora_flag)[0] for t in request.lora_weights)]
        flag = f"--{inference.flags.get('merged_file', 'merged_file')}"
        check_target(Path(request.merged_file), flag, sources=sources)
    session = ImageSession(inference, model, request)
    if request.merged_file is not None:
        return [session.save_merged(Path(request.merged_file))]
    if latents:
        with naming_memory(MEMORY_REMEDY):
            return [session.decode_file(file) for file in latents]
    if not request.interactive:
        prompts = [ImagePrompt(request.prompt)]
        if request.prompt_file is not None:
            prompts = read_minimal_prompts(Path(request.prompt_file), session.read_prompt)
        with naming_memory(MEMORY_REMEDY):
            return [session.generate(prompt) for prompt in prompts]
    default = inference.request(inference.options.from_args(argparse.Namespace())).prompt
    if request.prompt != default:
        logger.warning("--prompt has no effect with --interactive, which reads prompts from the keyboard")
    return generate_lines(session, lines, MEMORY_REMEDY)


def open_model(inference: MinimalInference, options: Any) -> OpenedModel:
    """Find the model's files; errors name the script's flags instead of those of training.

    Raises:
        UserError: files that are missing, or are of other models.
    """
    try:
        return inference.open(options)
    except UserError as error:
        text = for_images(str(error), inference.model_flag)
        raise UserError(text.replace("with --network_weights", f"with {inference.lora_flag}")) from None
