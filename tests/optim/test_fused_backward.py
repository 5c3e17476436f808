"""``--fused_backward_pass`` and its siblings: bit for bit the usual step, and no gradient stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.optim.fused_backward import FusedBackward, by_block, check_fusible, in_groups, one_by_one
from library.optim.optimizers import OptimizerChoice, resolve_optimizer
from library.optim.pieces import Pieces
from library.optim.stochastic_rounding import train_in_half
from library.optim.trial import updates_alone
from library.optim.two_weights import use_weights

CPU = torch.device("cpu")

#: name -> package, arguments, whether each parameter is updated by itself
OPTIMIZERS = {
    "AdamW": ("torch", (), True),
    "SGDNesterov": ("torch", (), True),
    "NAdam": ("torch", (), True),
    "Muon": ("torch", (), True),
    "Adafactor": ("transformers", ("relative_step=False",), True),
    "Lion": ("lion_pytorch", (), True),
    "AdamW8bit": ("bitsandbytes", (), True),
    "PagedAdamW8bit": ("bitsandbytes", (), True),
    # counts of steps and sums of weights lie in the group
    "AdamWScheduleFree": ("schedulefree", ("warmup_steps=2",), True),
    "Prodigy": ("prodigyopt", (), False),
    "DAdaptAdam": ("dadaptation", (), False),
}


def choice_of(name: str) -> OptimizerChoice:
    package, arguments, _ = OPTIMIZERS[name]
    pytest.importorskip(package)
    rate = 1.0 if name in ("Prodigy", "DAdaptAdam") else 1e-2
    return resolve_optimizer(name, False, False, arguments, rate)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trial_tells_which_optimizers_update_each_parameter_by_itself(name: str) -> None:
    choice = choice_of(name)
    assert updates_alone(choice, CPU) is OPTIMIZERS[name][2]
    if OPTIMIZERS[name][2]:
        check_fusible(name, True, "--fused_backward_pass")
    else:
        with pytest.raises(UserError, match=f"--fused_optimizer_groups: --optimizer_type {name} does not"):
            check_fusible(name, False, "--fused_optimizer_groups")


def model_of(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4, bias=False), nn.Linear(4, 4)
    )
    model[4].requires_grad_(False)
    return model.to(dtype)


WAYS = {
    "one by one": lambda model, parameters: one_by_one(parameters),
    "2 groups": lambda model, parameters: in_groups(parameters, 2),
    "9 groups": lambda model, parameters: in_groups(parameters, 9),
    "blocks": lambda model, parameters: by_block(parameters, [model[0], nn.Sequential(model[2], model[3])]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Adafactor", "AdamW", "AdamWScheduleFree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_usual_step(name: str, dtype: torch.dtype, way: str) -> None:
    """Two groups, a schedule, accumulation, a part without gradients in one step, a state in the middle."""
    results = []
    for fused in (False, True):
        model = model_of(dtype)
        choice = choice_of(name)
        groups = [
            {"params": [*model[0].parameters(), *model[2].parameters()], "lr": 1e-2},
            {"params": [*model[3].parameters()], "lr": 3e-3},
        ]
        optimizer = choice.create(groups)
        use_weights(optimizer, for_training=True)
        train_in_half(optimizer, seed=5, alone=True)
        pieces = Pieces(optimizer)
        hooks = FusedBackward(pieces, WAYS[way](model, [p for g in groups for p in g["params"]])) if fused else None
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
        for step in range(5):
            if step == 2:  # what the accelerator and a resumed state do: group dicts are others from here on
                optimizer.load_state_dict(optimizer.state_dict())
            model[3].requires_grad_(step != 3)
            for batch in range(2):
                x = torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * step + batch)).to(dtype)
                if hooks is not None:
                    hooks.before_backward(is_last=batch == 1)
                (model(x).float().square().mean() / 2).backward()
            if hooks is None:
                optimizer.step()
            else:
                assert all(p.grad is None for p in model.parameters())
                pieces.end_step()
            schedule.step()
            optimizer.zero_grad()
        results.append(([p.detach().clone() for p in model.parameters()], optimizer.state_dict()))
    (plain, plain_state), (found, found_state) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert plain_state["param_groups"] == found_state["param_groups"]
    assert not torch.equal(plain[0], next(iter(model_of(dtype).parameters())))


def test_parts() -> None:
    model = model_of(torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert [len(part) for part in one_by_one(parameters)] == [1, 1, 1, 1]
    assert [len(part) for part in in_groups(parameters, 3)] == [2, 2]
    # what lies in no block is one part
    assert [len(part) for part in by_block(parameters, [model[2]])] == [2, 2]
