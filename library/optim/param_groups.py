"""Names and values of learning rates, as trackers show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.optim.optimizers import OptimizerChoice


def lr_log_entries(optimizer: Any, choice: OptimizerChoice, descriptions: Sequence[str | None]) -> dict[str, float]:
    """``lr/<description>`` and ``lr/group<i>`` for each group; with a found rate ``d``, also ``lr/d*lr/...``.

    Args:
        optimizer: with the param groups that the descriptions are of.
        descriptions: the network's names for its groups; ``None`` for a group without one.
    """
    entries = {}
    for index, group in enumerate(optimizer.param_groups):
        names = [f"group{index}"]
        if index < len(descriptions) and descriptions[index]:
            names.insert(0, descriptions[index])
        rate = group["lr"]
        if rate is None:
            continue  # Adafactor keeps its relative step to itself
        for name in names:
            entries[f"lr/{name}"] = float(rate)
            if choice.finds_rate_itself and "d" in group:
                entries[f"lr/d*lr/{name}"] = float(group["d"]) * float(rate)
    return entries
