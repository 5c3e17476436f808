"""A network that refines the latents of images that were enlarged by Lanczos, for the highres fix.

Twenty residual blocks in five groups, on latents without the model's scale. Published files are read; the layers' names
are theirs.

Shape legend: B images, (h, w) latent size, (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.files.safetensors_io import is_pickle, load_pickle, load_tensors
from library.inference.upscaling import enlarged

if TYPE_CHECKING:
    from PIL.Image import Image

_GROUPS, _BLOCKS = 5, 4
#: channels of the latents
CHANNELS = 4
#: metadata of files that were trained here: the identity of the VAE
VAE_KEY = "latent_upscaler.vae"


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(hidden)) + x).relu()


class LatentUpscaler(nn.Module):
    """Returns refined latents (B, 4, h, w) of the same size."""

    def __init__(self, width: int = 128, inner: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for number in range(1, _GROUPS * _BLOCKS + 1):
            self.add_module(f"resblock{number}", _Block(width))
        self.conv2 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv_final = nn.Conv2d(inner, CHANNELS, 1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(latents)).relu()
        for group in range(_GROUPS):
            before = hidden
            for number in range(_BLOCKS):
                hidden = getattr(self, f"resblock{group * _BLOCKS + number + 1}")(hidden)
            hidden = hidden + before
        hidden = self.bn2(self.conv2(hidden)).relu()
        return self.conv_final(self.bn3(self.conv3(hidden))) + latents

    # ---- the protocol of --highres_fix_upscaler ----

    def support_latents(self) -> bool:
        return False

    @torch.no_grad()
    def upscale(
        self,
        vae: Any,
        images: Sequence[Image],
        latents: Tensor | None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int,
        vae_batch_size: int,
    ) -> Tensor:
        """Return the latents of images at (W, H), refined, as the denoiser sees them."""
        self.eval()  # batch norms with their stored statistics
        device = self.conv1.weight.device
        pixels = torch.stack([enlarged(image, (width, height)) for image in images]).to(device=device, dtype=vae.dtype)
        # the mean of the encoder's distribution: nothing is drawn
        encoded = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(max(vae_batch_size, 1))])
        refined = torch.cat([self(part.to(dtype)) for part in encoded.split(max(batch_size, 1))])
        return refined * vae.config.scaling_factor


def check_channels(config: Mapping[str, Any], where: object) -> None:
    """Raise UserError for a VAE with latents that the network does not read."""
    if config["latent_channels"] != CHANNELS:
        raise UserError(
            f"{where}: its latents have {config['latent_channels']} channels; a latent upscaler is for those of "
            f"{CHANNELS}, such as Stable Diffusion's"
        )


def load_latent_upscaler(path: Path, flag: str = "weights") -> LatentUpscaler:
    """Read a published file.

    Raises:
        UserError: no such file, or something else.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    tensors = load_pickle(path) if is_pickle(path) else load_tensors(path)
    if "conv1.weight" not in tensors or "conv3.weight" not in tensors:
        raise UserError(f"{flag} {path}: holds no latent upscaler (its first tensor is {next(iter(tensors), 'none')})")
    made = LatentUpscaler(tensors["conv1.weight"].shape[0], tensors["conv3.weight"].shape[0])
    try:
        made.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{flag} {path}: is damaged or of another kind ({str(error).splitlines()[1].strip()})"
        ) from None
    return made.eval()
