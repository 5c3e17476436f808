"""Compute the losses of one batch, for training, validation and the replay of a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning, Control, SampleFacts
from library.data.batch import Batch
from library.diffusion.objective import LossSettings, Objective
from library.randomness import Draw
from library.training.caption_encoder import CaptionEncoder
from library.training.kinds.base import Kind
from library.training.models import Models
from library.training.step import NoiseSettings, make_noisy, sample_losses


class BatchLosses:
    """Computes the losses of batches on the models' device.

    Args:
        captions: encodes them within autocast, so that trained encoders get gradients.
        dtype: of the denoiser's inputs.
        autocast: makes the mixed precision context.
        activations: makes the context of a forward pass of training.
    """

    def __init__(
        self,
        architecture: Architecture,
        kind: Kind,
        models: Models,
        captions: CaptionEncoder,
        objective: Objective,
        *,
        noise: NoiseSettings,
        loss: LossSettings,
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager[object]],
        activations: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._architecture = architecture
        self._kind = kind
        self._models = models
        self._captions = captions
        self._objective = objective
        self._noise = noise
        self._loss = loss
        self._dtype = dtype
        self._activations = activations
        self.autocast = autocast

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of each sample (B,) at a random timestep, times its weight, with a graph to the trained
        weights."""
        with self._activations(), self.autocast():
            latents, encoded = self.encode(batch)
            losses = self.at(batch, latents, encoded, noise=self._noise, draw=Draw(batch.visits))
            return losses * batch.loss_weights

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) as caches store them, and encoded captions; call it within autocast."""
        return self._latents(batch), self._captions(batch)

    def at(
        self,
        batch: Batch,
        latents: Tensor,
        encoded: Conditioning,
        *,
        noise: NoiseSettings,
        draw: Draw | None,
        level: int | None = None,
    ) -> Tensor:
        """Return the loss of each sample (B,), without its weight; call it within autocast.

        Args:
            latents: what ``encode`` gave, as ``encoded``.
            draw: source of random variation in training; ``None`` varies nothing.
            level: one of the objective's fixed levels, for all samples; without one, a timestep is drawn for each.
        """
        facts = SampleFacts(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        conditioning = self._architecture.condition(encoded, facts, draw)
        scaled = self._architecture.scale_latents(latents)
        made = make_noisy(scaled, batch.visits, self._objective, noise, level=level)
        prediction = self._kind.predict(
            self._models.denoiser, made.noisy.to(self._dtype), made.timesteps, conditioning, self._control(batch)
        )
        return sample_losses(prediction, made, self._objective, self._loss, masks=batch.loss_masks)

    def _latents(self, batch: Batch) -> Tensor:
        """Return cached latents, or encode them with random numbers keyed by the visit."""
        if batch.latents is not None:
            return batch.latents
        with torch.no_grad():
            generators = Draw(batch.visits).generators("latents")
            return self._architecture.encode_images(self._models.vae, batch.images, generators).float()

    def _control(self, batch: Batch) -> Control | None:
        if batch.conditioning_images is None:
            return None
        if self._kind.takes_images:
            return {"pixels": batch.conditioning_images}
        with torch.no_grad():
            generators = Draw(batch.visits).generators("conditioning latents")
            return self._architecture.encode_control(self._models.vae, batch.conditioning_images, generators)
