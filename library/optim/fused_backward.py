"""The update of a parameter as soon as its gradient is there (``--fused_backward_pass``).

Gradients then never exist all at once. The result is that of the usual step, bit for bit: what needs all gradients
together (clipping, accumulation, averaging over processes, loss scaling) is refused by ``library.config.rules``, and so
are optimizers that look at all parameters together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.errors import UserError

#: packages whose optimizers move every parameter by itself
BY_PARAMETER = ("torch.", "transformers.", "lion_pytorch.")


def moves_each_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update of some parameters, then of the others, is the update of all."""
    return type(optimizer).__module__.startswith(BY_PARAMETER)


def fuse_into_backward(optimizer: torch.optim.Optimizer) -> None:
    """Make the backward pass update each parameter and drop its gradient; a step that follows finds nothing to do.

    Args:
        optimizer: over parameters that are on their device already.

    Raises:
        UserError: an optimizer that needs all gradients at once.
    """
    if not moves_each_by_itself(optimizer):
        raise UserError(
            f"--fused_backward_pass: {type(optimizer).__name__} is not known to move every parameter by itself; "
            "use Adafactor, Lion, or an optimizer of torch, or remove it"
        )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_updates(optimizer, group))


def _updates(optimizer: torch.optim.Optimizer, group: dict[str, object]):
    @torch.no_grad()
    def update(parameter: Tensor) -> None:
        groups = optimizer.param_groups
        # the group's settings as they are now: a scheduler changes its rate
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    return update
