"""Enlarge the images of the highres fix's first stage, by Lanczos or by a module of ``--highres_fix_upscaler``.

Shape legend: B images, C latent channels, (h, w) latent size, (H, W) pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library.data.image_io import resize
from library.errors import UserError
from library.inference.features.image_to_image import encode_sources
from library.inference.models import GenerateOptions, ImageModels

if TYPE_CHECKING:
    from PIL.Image import Image

FLAG = "--highres_fix_upscaler"


class Upscaler:
    """A module with the published protocol: ``create_upscaler(**arguments)`` gives it.

    It has ``to``, ``support_latents()`` and ``upscale(vae, images, latents, dtype, width, height, batch_size,
    vae_batch_size)``, which returns images or latents as the denoiser sees them.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def reads_latents(self) -> bool:
        """Whether it enlarges latents, and not images."""
        return bool(self._module.support_latents())

    def sources(
        self,
        models: ImageModels,
        latents: Tensor,
        images: Sequence[Image],
        size: tuple[int, int],
        seeds: Sequence[int],
        options: GenerateOptions,
    ) -> Tensor:
        """Return what the second stage starts from, (B, C, h, w).

        Args:
            latents: of the first stage (B, C, h, w).
            images: the same decoded, unless it reads latents.
            size: (W, H) of the large images.
        """
        given = (None, latents) if self.reads_latents else (list(images), None)
        count = len(latents)
        with torch.inference_mode(False), torch.no_grad():
            found = self._module.upscale(models.vae, *given, options.dtype, *size, count, options.vae_batch_size)
        if isinstance(found[0], Tensor):
            return torch.stack([found[place] for place in range(count)]).to(latents)
        pixels = torch.stack([enlarged(image, size) for image in found])
        return encode_sources(models, pixels, seeds, options.device)


def load_upscaler(name: str, arguments: str | None, device: torch.device, dtype: torch.dtype) -> Upscaler:
    """Make the upscaler of a module.

    Args:
        arguments: ``key=value;key=value``.

    Raises:
        UserError: no such module, or one without the protocol.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{FLAG} {name}: cannot be imported ({error}); tools.latent_upscaler is one") from None
    if not hasattr(module, "create_upscaler"):
        raise UserError(f"{FLAG} {name}: it has no create_upscaler; tools.latent_upscaler is such a module")
    given: dict[str, str] = {}
    for part in filter(None, (arguments or "").split(";")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f'{FLAG}_args: "{part}" is not key=value; several are joined with semicolons')
        given[key.strip()] = value.strip()
    try:
        made = module.create_upscaler(**given)
    except TypeError as error:
        raise UserError(f"{FLAG}_args: {name} cannot be made with {sorted(given)} ({error})") from None
    made = made.to(dtype).to(device)
    return Upscaler(made.eval() if hasattr(made, "eval") else made)


def enlarged(image: Image, size: tuple[int, int]) -> Tensor:
    """Return an image (3, H, W) in [-1, 1], resized to (W, H)."""
    pixels = np.asarray(image)
    if (pixels.shape[1], pixels.shape[0]) != size:
        pixels = resize(pixels, size, "lanczos")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1.0
