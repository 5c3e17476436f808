"""Move modules between host and device; ``MemoryPlan.stage`` says which parts are where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

#: attribute of a module that computes where it was loaded, whatever the run's device is
STAYS = "stays_where_it_is"


def move(module: nn.Module, device: torch.device | str) -> None:
    """Move a module; weights that are moved in inference mode could not be moved again outside of it."""
    with torch.inference_mode(False):
        module.to(device)


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module on a device within the context; it returns to where it was."""
    parameter = next(module.parameters(), None)
    home = parameter.device if parameter is not None else device
    if home == device or getattr(module, STAYS, False):
        yield
        return
    move(module, device)
    try:
        yield
    finally:
        move(module, home)
