"""Precisions as the options of the file tools name them, and casting to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: precisions to compute in
COMPUTE = {"float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
#: precisions of saved weights; fp8 holds no scales: numbers of 4 (e4m3fn) or 5 (e5m2) bits of exponent, as published
SAVED = {**COMPUTE, "fp8": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def parse_precision(flag: str, text: str, known: dict[str, str]) -> torch.dtype:
    """Return the dtype that an option's text names.

    Raises:
        UserError: an unknown name.
    """
    import torch

    if text not in known:
        raise UserError(f"{flag} {text}: unknown; choose from {', '.join(known)}{did_you_mean(text, known)}")
    return getattr(torch, known[text])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``tensor`` to ``dtype``; integers stay, and numbers too large for fp8 become its largest number instead of
    NaN."""
    import torch

    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        # fp8 tensors cannot be clamped
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        return wide.clamp(-largest, largest).to(dtype)
    return tensor.to(dtype)
