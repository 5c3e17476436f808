"""The state of a latent upscaler's training, from which it goes on exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.files.atomic import atomic_path

_KEYS = {"step", "settings", "network", "optimizer", "schedule"}


def write_state(
    path: Path,
    *,
    step: int,
    settings: Mapping[str, object],
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
) -> None:
    """Write the state after ``step``.

    Args:
        settings: all that the result depends on.
    """
    state = {
        "step": step,
        "settings": dict(settings),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path, settings: Mapping[str, object]) -> dict[str, Any]:
    """Return a state that belongs to a run of these settings.

    Raises:
        UserError: the file is damaged, or its run had other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--resume: {path} cannot be read ({reason}); begin anew with --overwrite") from None
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"--resume: {path} holds no state of a latent upscaler; begin anew with --overwrite")
    before = state["settings"]
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        shown = "; ".join(f"{name} was {before.get(name)} and is {settings[name]}" for name in changed)
        raise UserError(f"--resume: {path} is of another run: {shown}")
    return state
