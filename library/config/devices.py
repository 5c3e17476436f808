"""Parse devices in the options of the file tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    import torch


def parse_device(flag: str, text: str) -> torch.device:
    """Return the device that an option's text names.

    Raises:
        UserError: an unknown name, or a device that is not there.
    """
    import torch

    try:
        device = torch.device(text)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {text}: no such device here ({reason}); cpu always works") from None
    return device
