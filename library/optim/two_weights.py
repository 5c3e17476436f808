"""Switch optimizers with two sets of weights: one for training, one for use (schedule-free ones)."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

#: the training weights, on the host, of optimizers whose weights for use are in place
_TRAINED: WeakKeyDictionary[torch.optim.Optimizer, list[Tensor]] = WeakKeyDictionary()


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer has ``train`` and ``eval``, which switch between two sets."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@torch.no_grad()
def use_weights(optimizer: torch.optim.Optimizer, *, for_training: bool) -> None:
    """Put the weights for training, or those for use, in place. Other optimizers are unchanged.

    An optimizer computes one set from the other, with rounding. So the training weights are kept and put back, and
    training does not depend on how often something is saved, generated or validated.
    """
    if not has_modes(optimizer):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if for_training:
        optimizer.train()
        for parameter, trained in zip(parameters, _TRAINED.pop(optimizer, ()), strict=False):
            parameter.copy_(trained)
    elif optimizer not in _TRAINED:
        _TRAINED[optimizer] = [p.detach().to("cpu", copy=True) for p in parameters]
        optimizer.eval()
