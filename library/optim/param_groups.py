"""Names and values of learning rates, as trackers show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.optim.optimizers import OptimizerChoice


def default_descriptions(num_groups: int, *, trains_text_encoder: bool) -> list[str | None]:
    """Names for the groups of a network that gives none: text encoder, U-Net, and none for further ones."""
    names = ["textencoder", "unet"] if trains_text_encoder else ["unet"]
    return [names[index] if index < len(names) else None for index in range(num_groups)]


def lr_log_entries(optimizer: Any, choice: OptimizerChoice, descriptions: Sequence[str | None]) -> dict[str, float]:
    """``lr/<description>`` and ``lr/group<i>`` for each group; with a found rate ``d``, also ``lr/d*lr/...``.

    ProdigyPlus finds a rate per group: ``lr/d*lr`` is the first one's, ``lr/d*lr/group<i>`` each one's.

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
        for name in (description, f"group{index}"):
            if name:
                entries[f"lr/{name}"] = float(rate)
        if not (choice.finds_rate_itself and "d" in group):
            continue
        found = float(group["d"]) * float(rate)
        entries[f"lr/d*lr/group{index}"] = found
        if choice.finds_rate_per_group:
            entries.setdefault("lr/d*lr", found)
        elif description:
            entries[f"lr/d*lr/{description}"] = found
    return entries
