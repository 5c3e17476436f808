"""LoRA-GGPO: training under random perturbations of the weights, for flatter minima.

Chang et al. 2025, "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation
Optimization" (arXiv:2502.14538), which adds the gradient's norms to the random perturbation of Li et al. 2024,
"Flat-LoRA" (arXiv:2409.14396). In training, and only there, an adapted layer computes (W' + E) x with

    W' = W + multiplier (alpha / r) U D,    E_ij ~ N(0, s_i^2 / n),    s_i = sigma |W'_i| + beta |G_i|,

row i being an output feature, n the number of inputs, sigma ``ggpo_sigma``, beta ``ggpo_beta``. G is the gradient of
the loss with respect to W', which a LoRA does not compute in full. The gradient of U, (alpha / r) G D^T, gives the part
of G's rows in the span of D's,

    P = (r / alpha) dU (D D^T)^-1 D,    |P_i|^2 = (r / alpha)^2 dU_i (D D^T)^-1 dU_i^T,

which replaces |G_i|, from the gradients that the last step's update used (0 before the first).

E is a function of the run's seed, the step and the module's name, drawn on the device of the activations: accumulated
batches share it, recomputed blocks get the same, and a resumed run is exact, because the norms of the last gradients
are part of training states (not of saved files, nor of the recordings for ``--replay``). Without this project's
trainer, networks are not perturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.randomness import key
from networks.lora_module import LoraModule
from networks.split_lora import SplitLoraModule


@dataclass(frozen=True)
class Perturbation:
    """The strength, relative to the norms of weights and of gradients."""

    sigma: float
    beta: float


class _Perturbed(torch.autograd.Function):
    """E x for a frozen E (out, in), which is drawn again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(scales)
        ctx.seed, ctx.shape = seed, (scales.shape[0], x.shape[-1])
        return F.linear(x, _draw(scales, ctx.shape, seed).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scales,) = ctx.saved_tensors
        return gradient @ _draw(scales, ctx.shape, ctx.seed).to(gradient.dtype), None, None


def _draw(scales: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """E (out, in) with rows of the standard deviations s_i / sqrt(n), float32; ``scales`` are the s_i."""
    generator = torch.Generator(scales.device).manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, device=scales.device)
    return drawn * (scales / shape[1] ** 0.5)[:, None]


class PerturbedLoraModule(LoraModule):
    """A LoRA of a ``Linear`` whose weight is perturbed in training."""

    def __init__(self, *args: Any, perturbation: Perturbation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.perturbation = perturbation
        self._step: tuple[int, int] | None = None
        self._gradient_norms: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.weight_shape[0]

    def begin_step(self, seed: int, step: int, gradient_norms: Tensor) -> None:
        """Args: ``gradient_norms`` (out,) is of the last step's gradients."""
        self._step, self._gradient_norms = (seed, step), gradient_norms

    def add_change(self, out: Tensor, x: Tensor) -> Tensor:
        out = super().add_change(out, x)
        if not self.training or self._step is None:
            return out
        return out + self._perturbed(x).to(out.dtype)

    @torch.compiler.disable  # the hash and the generator are not for a graph
    def _perturbed(self, x: Tensor) -> Tensor:
        """Return E x."""
        assert self._step is not None
        seed, step = self._step
        return _Perturbed.apply(x, self.row_scales(), key(seed, "ggpo", step, self.lora_name))

    @torch.no_grad()
    def row_scales(self) -> Tensor:
        """s (out,) of this step, float32."""
        assert self._gradient_norms is not None
        changed = self.base_weight.float() + self.get_weight()  # (out, in)
        weight_norms = torch.linalg.vector_norm(changed, dim=1)
        return self.perturbation.sigma * weight_norms + self.perturbation.beta * self._gradient_norms

    @torch.no_grad()
    def gradient_norms(self, previous: Tensor) -> Tensor:
        """|P_i|, (out,) float32; ``previous`` where there is no gradient, or none that is finite. Waits for nothing."""
        norms = []
        ups = self.up_parameters()
        for up, down, before in zip(ups, self._downs(), previous.split([len(up) for up in ups]), strict=True):
            if up.grad is None or not self.scale:
                norms.append(before)
                continue
            g, d = up.grad.float(), down.detach().float()  # (width, r), (r, in)
            solved, _ = torch.linalg.solve_ex(d @ d.T, g.T)  # (r, width)
            now = (g * solved.T).sum(dim=1).clamp(min=0.0).sqrt() / abs(self.scale)
            norms.append(torch.where(now.isfinite(), now, before))
        return torch.cat(norms)

    def _downs(self) -> list[Tensor]:
        """Return the down half of each of ``up_parameters``."""
        return [self.lora_down.weight]


class PerturbedSplitLoraModule(PerturbedLoraModule, SplitLoraModule):
    """The same for the projections in one ``Linear``."""

    def _downs(self) -> list[Tensor]:
        return list(self.pieces("down"))


def begin_step(adapters: Sequence[PerturbedLoraModule], norms: Tensor, seed: int, step: int) -> None:
    """Args: ``norms`` are the adapters' gradient norms of the last step, one after the other."""
    for adapter, own in zip(adapters, norms.split([adapter.rows for adapter in adapters]), strict=True):
        adapter.begin_step(seed, step, own)


@torch.no_grad()
def keep_gradient_norms(adapters: Sequence[PerturbedLoraModule], norms: Tensor) -> None:
    """Update ``norms``, the adapters' one after the other, from the present gradients."""
    for adapter, own in zip(adapters, norms.split([adapter.rows for adapter in adapters]), strict=True):
        if any(up.grad is not None for up in adapter.up_parameters()):
            own.copy_(adapter.gradient_norms(own))
