"""Images of ``conditioning_data_dir`` as input of a model, where the family has one that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library.architectures.base import Architecture, Conditioning
from library.data.dataset import Batch
from library.randomness import torch_generator

if TYPE_CHECKING:
    from library.training.run import Run


def with_images(architecture: Architecture, run: Run, batch: Batch, conditioning: Conditioning) -> Conditioning:
    """Conditioning with the latents of the batch's conditioning images, if it has any; draws keyed by the visit."""
    if batch.conditioning_images is None:
        return conditioning
    run.vae.to(run.device)  # after caching latents it waits on the host
    generators = [torch_generator(visit, "conditioning latents") for visit in batch.visits]
    with torch.no_grad():
        latents = architecture.encode_images(run.vae, batch.conditioning_images, generators)
        latents = architecture.scale_latents(latents)
    return Conditioning({**conditioning.tensors, "image": latents})
