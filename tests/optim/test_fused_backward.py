"""``--fused_backward_pass``: bit for bit the usual step, and no gradient stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.optim.fused_backward import fuse_into_backward
from library.optim.stochastic_rounding import train_in_half


def adafactor(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=True)


MAKERS = {"Adafactor": adafactor, "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2)}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_usual_step(name: str, dtype: torch.dtype) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 4)).to(dtype)
        model[3].requires_grad_(False)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-3}]
        optimizer = MAKERS[name](groups)
        train_in_half(optimizer, seed=5)
        if fused:
            fuse_into_backward(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
        for step in range(4):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(x).float().square().mean().backward()
            if fused:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.manual_seed(0)
    assert not torch.equal(results[1][0], nn.Linear(8, 16).to(dtype).weight)


def test_optimizers_that_look_at_all_parameters_together_are_refused() -> None:
    prodigy = pytest.importorskip("prodigyopt").Prodigy([nn.Parameter(torch.ones(2))])
    with pytest.raises(UserError, match="--fused_backward_pass: Prodigy"):
        fuse_into_backward(prodigy)
