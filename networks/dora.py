"""DoRA: a LoRA whose weight is split into directions and magnitudes, which are trained too.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), equation 5:

    W' = m * V / |V|_c,    V = W + (alpha / r) U D

with one magnitude m for each column of V, at first the column's norm |W|_c. As in section 4.3 of the paper, |V|_c is
computed at each step without a gradient.

Programs differ in what a column is, and the shape of ``dora_scale`` shows it:

* ``input``, the default: one magnitude for each input feature, norms over the outputs (and the kernel); (1, in) or
  (1, in, 1, 1). It is the paper's own, W being (out, in), and what ComfyUI and Forge apply exactly.
* ``output``: one for each output feature, norms over the inputs; (out, 1) or (out, 1, 1, 1). PEFT trains it and, by
  default, LyCORIS. ComfyUI uses |W| instead of |V|, so its images differ a little.

diffusers' pipelines ignore ``dora_scale`` in files with the published names, with a warning.

A strength other than 1 interpolates between W and W', as in ComfyUI: W + multiplier (W' - W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks.adapter_module import Dropouts
from networks.lora_module import LoraModule
from networks.own_product import is_alone, own_product, product
from networks.targets import FoundModule, RankAlpha

_EPS = torch.finfo(torch.float32).eps


class DoraModule(LoraModule):
    """Low-rank change of the directions, and the magnitudes, of one ``Linear`` or ``Conv2d``."""

    def __init__(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float = 1.0, dropouts: Dropouts = Dropouts()
    ) -> None:
        super().__init__(found, size, multiplier=multiplier, dropouts=dropouts)
        self.on_output = size.dora == "output"
        self.dora_scale = nn.Parameter(self._norms(found.module.weight.detach().float()))

    def _norms(self, weight: Tensor) -> Tensor:
        """Norms of the columns of a weight (out, in[, kh, kw]), in the shape of ``dora_scale``."""
        axes = [axis for axis in range(weight.dim()) if axis != (0 if self.on_output else 1)]
        return torch.linalg.vector_norm(weight, dim=axes, keepdim=True)

    def _base(self) -> Tensor:
        """W, float32, where the adapter's parameters are."""
        return self.base_weight.detach().to(device=self.lora_up.weight.device, dtype=torch.float32)

    def _factors(self) -> Tensor:
        """m / |V|_c, float32, in the shape of ``dora_scale``; exactly 1 in a new network."""
        with torch.no_grad():
            norms = self._norms(self._base() + self.low_rank_weight())
        return self.dora_scale.float() / norms.clamp(min=_EPS)

    def _along(self, factors: Tensor) -> Tensor:
        """Return factors in a shape that broadcasts over input or output features: (n,), or (1, n, 1, 1)."""
        flat = factors.flatten()
        return flat.view(1, -1, 1, 1) if isinstance(self.original, nn.Conv2d) else flat

    # ---- forward ----

    def changed_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.on_output or not is_alone(self):
            return super().changed_output(x, *args, **kwargs)
        # V with scaled columns is V of scaled inputs, so the module's own product is enough
        factors = self._along(self._factors())
        kept = 1.0 + self.multiplier * (factors - 1.0)
        out = self._original_forward((x * kept).to(x.dtype), *args, **kwargs)
        return super().add_change(out, (x * factors).to(x.dtype))

    def add_change(self, out: Tensor, x: Tensor) -> Tensor:
        factors = self._along(self._factors())
        moved = self.multiplier * (factors - 1.0)
        strength = self.multiplier * self.scale
        if self.on_output:
            change = own_product(self, out, x) * moved + self.low_rank_output(x) * (strength * factors)
        else:
            change = product(self, (x * moved).to(x.dtype)) + self.low_rank_output((x * factors).to(x.dtype)) * strength
        return (out + change).to(out.dtype)

    # ---- merging ----

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        base = self._base()
        changed = (base + self.low_rank_weight()) * self._factors()
        return (changed - base) * (self.multiplier if multiplier is None else multiplier)
