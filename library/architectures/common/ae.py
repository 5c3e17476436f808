"""The autoencoder of FLUX.1, Chroma and Lumina-Image 2.0: 16 latent channels, from a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from library.architectures.common import kl_vae
from library.architectures.common.checkpoint import locate
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.recognise import what_it_is
from library.architectures.common.sources import diffusers_vae_source, in_file, vae_source
from library.architectures.common.tensor_files import TensorFile
from library.errors import UserError

CHANNELS = 16
#: the transformer sees (latents - SHIFT) * SCALE
SCALE, SHIFT = 0.3611, 0.1159


def ae_source(path_or_id: str, *, flag: str = "--ae") -> ModelSource:
    """Return the autoencoder in its own file, in a checkpoint, or in a Diffusers folder.

    Raises:
        UserError: nothing there, no autoencoder in it, or one of another family.
    """
    path = locate(path_or_id, flag=flag, components=("vae",))
    if path.is_dir():
        source = diffusers_vae_source(path / "vae" if (path / "vae").is_dir() else path)
    else:
        file = TensorFile.open(path)
        found = in_file(path, vae_source, file)
        if found is None:
            what = what_it_is(file.shapes.keys(), "flux_ae", "encoder.conv_in.weight")
            raise UserError(f"{flag} {path}: not an autoencoder ({what}); give ae.safetensors of FLUX.1")
        source = found
        if source.layout.prefix == kl_vae.LDM_PREFIX and source.config["latent_channels"] == CHANNELS:
            raise UserError(
                f"{flag} {path}: a checkpoint of Stable Diffusion, whose VAE is another one for as many channels; give "
                "ae.safetensors of FLUX.1"
            )
    channels = source.config["latent_channels"]
    if channels != CHANNELS:
        raise UserError(
            f"{flag} {path}: this VAE has {channels} latent channels (Stable Diffusion 1.x, 2.x and SDXL have 4), "
            f"FLUX.1 needs {CHANNELS}; give ae.safetensors of FLUX.1"
        )
    return source


def load_ae(source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Load diffusers' ``AutoencoderKL``, frozen, in eval mode."""
    return load_frozen(source, partial(kl_vae.build_vae, source.config), dtype=dtype, device=device)


def ae_tensors(vae: nn.Module) -> Mapping[str, Tensor]:
    """Return the model's tensors under the published names, without prefix."""
    return dict(kl_vae.ldm_vae_layout(vae.config, prefix="").write(vae.state_dict()))
