"""States and gradients lie in memory as the parameters do, whatever they were saved from."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.optim.gradient_exchange import GradientExchange
from library.optim.states import keep_state_dtypes

SHAPE = (8, 4, 3, 3)


def weight(memory_format: torch.memory_format) -> nn.Parameter:
    numbers = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(numbers.to(memory_format=memory_format))


def steps(parameter: nn.Parameter, state: dict[str, Any] | None, first: int) -> dict[str, Any]:
    """Two steps of the fused AdamW, which goes through the numbers as they lie in memory."""
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    keep_state_dtypes(optimizer)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for number in (first, first + 1):
        gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("before", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("after", [torch.channels_last, torch.contiguous_format])
def test_a_state_goes_on_in_another_memory_format(before: torch.memory_format, after: torch.memory_format) -> None:
    """As between a whole weight and shards of it."""
    saved_from = weight(before)
    state = steps(saved_from, None, 1)
    steps(saved_from, state, 3)
    resumed = weight(torch.contiguous_format)
    steps(resumed, None, 1)
    parameter = nn.Parameter(resumed.detach().to(memory_format=after))
    steps(parameter, state, 3)
    torch.testing.assert_close(parameter, saved_from, rtol=0, atol=1e-6)


def test_gradients_in_exchanged_tensors_lie_as_their_parameters() -> None:
    parameters = [weight(torch.channels_last), weight(torch.contiguous_format), nn.Parameter(torch.zeros(5))]
    accelerator: Any = SimpleNamespace(num_processes=2)
    GradientExchange(accelerator, parameters, as_views=True).start()
    for parameter in parameters:
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
    whole = parameters[0].grad
    assert whole is not None and whole.untyped_storage().nbytes() == 4 * sum(p.numel() for p in parameters)
