"""What a run trains: its parameters and what moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from library.training.ema import WeightAverage


@dataclass
class Trained:
    """The parameters of a run and what moves them."""

    parameters: Sequence[nn.Parameter]
    optimizer: Any
    scheduler: Any
    max_grad_norm: float
    #: of the parameters, with ``state_dict`` and ``load_state_dict``
    average: WeightAverage | None = None
    #: see ``library.training.gradient_exchange``
    gradients_as_views: bool = False
