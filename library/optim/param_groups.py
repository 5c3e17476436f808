"""Names and values of learning rates for trackers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.optim.optimizers import OptimizerChoice


def default_descriptions(num_groups: int, *, trains_text_encoder: bool) -> list[str | None]:
    """Return names for the groups of a network without descriptions: text encoder, U-Net, and none for further ones."""
    names = ["textencoder", "unet"] if trains_text_encoder else ["unet"]
    return [names[index] if index < len(names) else None for index in range(num_groups)]


def lr_log_entries(optimizer: Any, choice: OptimizerChoice, descriptions: Sequence[str | None]) -> dict[str, float]:
    """One entry for each group, ``lr/<description>``; with a found rate ``d``, also ``lr/d*lr/<description>``.

    A group without a description, or with that of another group, is ``group<i>``.

    Args:
        optimizer: with the param groups that the descriptions are of.
        descriptions: the network's names for its groups; ``None`` for a group without one.
    """
    entries: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        rate = group["lr"]
        if rate is None:
            continue  # Adafactor's relative step before its scheduler is made
        description = descriptions[index] if index < len(descriptions) else None
        name = description if description and f"lr/{description}" not in entries else f"group{index}"
        entries[f"lr/{name}"] = float(rate)
        if choice.finds_rate_itself and "d" in group:
            entries[f"lr/d*lr/{name}"] = float(group["d"]) * float(rate)
    return entries
