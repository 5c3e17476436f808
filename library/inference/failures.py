"""Describe what goes wrong while images are generated: values that are not finite, and too little memory."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.files.finite import not_finite


class NotFinite(UserError):
    """The image would be black or partly black, because its latents or pixels hold NaN or infinity."""


class OutOfMemory(UserError):
    """An image, or a batch of them, needs more memory than there is."""


def cause_in(models: Mapping[str, nn.Module | None], others: Mapping[str, Mapping[str, Tensor]] | None = None) -> str:
    """Return which weight or tensor is not finite; "" if all are finite.

    Args:
        models: by their names.
        others: other tensors in the computation, by name, by the name of their group.
    """
    for what, model in models.items():
        if model is not None and (bad := not_finite(model.named_parameters())):
            return f"the weight {bad[0]} of the {what} holds NaN or infinity; the file is damaged"
    for what, tensors in (others or {}).items():
        if not_finite(tensors.items()):
            return f"the {what} gives values that are not finite"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the host's memory was too small; torch raises different errors for them."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def naming_memory(remedy: str) -> Iterator[None]:
    """Turn out-of-memory errors into one line.

    Args:
        remedy: advice for the user.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they keep the tensors of the computation alive
        raise OutOfMemory(f"not enough memory for this size; {remedy}") from None
