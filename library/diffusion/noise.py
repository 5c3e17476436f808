"""Draw the noise of training, and its published variants.

Every draw takes one CPU generator per sample, so a sample's noise does not depend on its batch. The numbers are drawn
on the CPU and copied, so every device trains on the same ones.
Shape legend: B batch, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (B, C, h, w) on the CPU.

    Args:
        shape: of one sample, (C, h, w).
        generators: one for each sample.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def _uniform(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """One number from [0, 1) for each sample, (B, 1, 1, 1), on the device of ``like``."""
    drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return drawn.view(-1, 1, 1, 1).to(like.device, like.dtype, non_blocking=True)


def offset_noise(
    noise: Tensor,
    latents: Tensor,
    generators: Sequence[torch.Generator],
    *,
    offset: float,
    random_strength: bool = False,
    adaptive_scale: float | None = None,
) -> Tensor:
    """Add to each channel a constant of its own, so that overall brightness is learned too.

    Guttenberg 2023, "Diffusion with offset noise": noise + offset * randn(B, C, 1, 1).

    Args:
        noise: (B, C, h, w).
        latents: (B, C, h, w), for ``adaptive_scale``.
        generators: one for each sample.
        offset: strength.
        random_strength: multiply it for each sample by a number from [0, 1).
        adaptive_scale: add ``|mean of the latents' channel| * adaptive_scale``; the sum is at least 0.
    """
    strength: Tensor | float = offset
    if random_strength:
        strength = _uniform(generators, noise) * offset
    if adaptive_scale is not None:
        strength = (strength + latents.mean(dim=(2, 3), keepdim=True).abs() * adaptive_scale).clamp(min=0.0)
    drawn = draw_noise((noise.shape[1], 1, 1), generators)
    return noise + strength * drawn.to(noise.device, noise.dtype, non_blocking=True)


def pyramid_noise(noise: Tensor, generators: Sequence[torch.Generator], *, iterations: int, discount: float) -> Tensor:
    """Add coarser and coarser noise, each layer ``discount`` times weaker, and bring it back to unit spread.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training". The sides of layer i are the full ones
    divided by r ** i, r drawn from [2, 4) for each layer: full size, then about a third, then about a ninth. (The
    article's listing divides those of the layer before and names both as variants; this one is published with the
    option.) Sizes and spread are each sample's own, so that its noise does not depend on its batch.

    Args:
        noise: (B, C, h, w), standard normal, perhaps with an offset.
        generators: one for each sample.
        iterations: layers at most; fewer when a side is down to one cell.
        discount: weight of layer i is ``discount ** i``.
    """
    layers = torch.stack([_coarse_layers(noise.shape[1:], generator, iterations, discount) for generator in generators])
    total = noise + layers.to(noise.device, noise.dtype, non_blocking=True)
    return total / total.std(dim=(1, 2, 3), keepdim=True)


def _coarse_layers(shape: torch.Size, generator: torch.Generator, iterations: int, discount: float) -> Tensor:
    """The sum of one sample's coarse layers, (C, h, w) on the CPU."""
    channels, height, width = shape
    total = torch.zeros(shape)
    for layer in range(iterations):
        shrink = (torch.rand(1, generator=generator).item() * 2 + 2) ** layer
        h, w = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn((1, channels, h, w), generator=generator)
        total += functional.interpolate(coarse, size=(height, width), mode="bilinear")[0] * discount**layer
        if h == 1 or w == 1:
            break
    return total


def perturb_input(
    noise: Tensor, generators: Sequence[torch.Generator], *, gamma: float, random_strength: bool = False
) -> Tensor:
    """Noise for the model's input only: eps + gamma * xi, xi standard normal.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv:2301.11706).
    The target stays ``noise``.

    Args:
        noise: (B, C, h, w).
        generators: one for each sample.
        gamma: strength, 0.1 in the paper.
        random_strength: multiply it for each sample by a number from [0, 1).
    """
    strength: Tensor | float = _uniform(generators, noise) * gamma if random_strength else gamma
    drawn = draw_noise(tuple(noise.shape[1:]), generators)
    return noise + strength * drawn.to(noise.device, noise.dtype, non_blocking=True)
