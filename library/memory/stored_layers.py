"""Layers whose frozen weights are stored in a small form (``--fp8_base``, ``--fp8_scaled``, ``--quantize_base``).

Weights are dequantized for each product and freed at once. The backward pass dequantizes them again; autograd would
keep a full-size copy of every layer's weight until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.forms import FORMS, FP8

#: attribute of a parameter: the scale that its file has beside fp8 numbers
PUBLISHED_SCALE = "published_scale"
#: layers of a transformer's blocks that keep their dtype, by parts of their names
_KEPT = ("norm", "_emb")
_LARGEST = torch.finfo(FP8).max


class StoredLayer(nn.Module):
    """The common part of these layers: ``weight`` is computed when it is read, and cannot be written."""

    numbers: Tensor
    scale: Tensor
    form: str  # in ``FORMS``
    weight_shape: torch.Size
    weight_dtype: torch.dtype  # of ``weight``
    #: whether inputs are rounded to fp8, too, so that the device multiplies fp8 numbers (``--fp8_matmul``)
    products_in_fp8 = False

    def take(self, form: str, device: torch.device) -> None:
        """Replace the weight by its small form, made on ``device``."""
        weight = self._parameters.pop("weight")
        published = getattr(weight, PUBLISHED_SCALE, None)
        self.form, self.weight_shape, self.weight_dtype = form, weight.shape, weight.dtype
        numbers, scale = FORMS[form].quantise(weight.detach().to(device), published)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        return FORMS[self.form].dequantise(self.numbers, self.scale, self.weight_shape, self.weight_dtype)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return input and bias in the dtype of the product: autocast's within autocast, else the input's."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.to(dtype), None if self.bias is None else self.bias.to(dtype)


class StoredLinear(StoredLayer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x, bias = self._inputs(x)
        product = _Fp8Product if self.products_in_fp8 else _Linear
        return product.apply(x, self.numbers, self.scale, bias, self.form, self.weight_shape)


class StoredConv2d(StoredLayer, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x, bias = self._inputs(x)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Conv2d.apply(x, self.numbers, self.scale, bias, self.form, self.weight_shape, geometry)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None, form: str, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.form, ctx.shape = form, shape
        return F.linear(x, FORMS[form].dequantise(numbers, scale, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        numbers, scale = ctx.saved_tensors
        weight = FORMS[ctx.form].dequantise(numbers, scale, ctx.shape, gradient.dtype)
        return gradient @ weight, None, None, None, None, None


class _Fp8Product(_Linear):
    """A product of fp8 numbers: each token of the input has its own scale. The backward pass is that of ``_Linear``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None, form: str, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.form, ctx.shape = form, shape
        out = multiply_fp8(x.flatten(0, -2), numbers, scale).to(x.dtype).unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias


def multiply_fp8(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """Return x (M, in) times the transpose of a weight (out, in) of fp8 numbers with scales (out, 1), in bfloat16."""
    of_rows = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / _LARGEST  # (M, 1)
    rounded = (x / of_rows).clamp_(-_LARGEST, _LARGEST).to(FP8)
    return torch._scaled_mm(rounded, numbers.t(), scale_a=of_rows, scale_b=scale.t(), out_dtype=torch.bfloat16)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device multiplies fp8 numbers with a scale for each row; found out by trying."""
    try:
        multiply_fp8(
            torch.ones(16, 16, device=device, dtype=torch.bfloat16),
            torch.ones(16, 16, device=device).to(FP8),
            torch.ones(16, 1, device=device),
        )
    except (RuntimeError, AttributeError, TypeError):
        return False
    return True


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        numbers: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        form: str,
        shape: torch.Size,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.input_shape, ctx.form, ctx.shape, ctx.geometry = x.shape, form, shape, geometry
        return F.conv2d(x, FORMS[form].dequantise(numbers, scale, shape, x.dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        numbers, scale = ctx.saved_tensors
        weight = FORMS[ctx.form].dequantise(numbers, scale, ctx.shape, gradient.dtype)
        return torch.nn.grad.conv2d_input(ctx.input_shape, weight, gradient, *ctx.geometry), *[None] * 6


def stored_layers_of(
    model: nn.Module, blocks: Sequence[Sequence[nn.Module]] = ()
) -> Iterator[tuple[nn.Module, type[StoredLayer]]]:
    """Yield the layers whose weights are stored in a small form: those of the repeated blocks.

    Layers outside of them (the first and last layers, time embeddings) are few and sensitive, and keep their dtype.

    Args:
        blocks: the family's lists of blocks; without them, blocks are the modules with a number in their path.
    """
    if blocks:
        named = [pair for listed in blocks for block in listed for pair in block.named_modules()]
        chosen = [module for path, module in named if not any(word in path for word in _KEPT)]
    else:
        chosen = [m for path, m in model.named_modules() if any(name.isdigit() for name in path.split("."))]
    for module in chosen:
        kind = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}.get(type(module))
        padding = getattr(module, "padding", 0)
        plain = getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(padding, str)
        if kind is not None and plain:
            yield module, kind


def store_weights(
    model: nn.Module,
    form: str,
    device: torch.device,
    *,
    home: torch.device | str | None = None,
    blocks: Sequence[Sequence[nn.Module]] = (),
    products_in_fp8: bool = False,
) -> nn.Module:
    """Store the weights of a frozen model's blocks in a small form, in place, and move the model to ``home``.

    Layers are converted one by one, so at most the largest one is on the device at full size.

    Args:
        form: in ``FORMS``.
        device: where the numbers are computed.
        home: the same, if not given.
        blocks: see ``stored_layers_of``.
        products_in_fp8: multiply fp8 numbers, where the device, and a layer's scales and sizes, allow it.
    """
    products_in_fp8 = products_in_fp8 and multiplies_fp8(device)
    for module, kind in list(stored_layers_of(model, blocks)):
        # the instance stays the same object, because other modules refer to it
        module.__class__ = kind
        module.take(form, device)
        if products_in_fp8 and kind is StoredLinear and module.numbers.dtype == FP8:
            by_row = module.scale.dim() == 2
            module.products_in_fp8 = by_row and not any(size % 16 for size in module.weight_shape)
        if home is not None:
            module.to(home)
    return model.to(device if home is None else home)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
