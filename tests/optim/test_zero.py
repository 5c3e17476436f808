"""DeepSpeed's update in pieces is the optimizer's own, in two processes; its states are whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.optim.zero import Zero, ZeroOptimizer, check_optimizer

#: every way of sharing out
WAYS = [
    Zero(0),
    Zero(1),
    Zero(1, on_host=True),
    Zero(2),
    Zero(2, on_host=True),
    Zero(2, settings={"overlap_comm": True}),
]

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "NAdam": (torch.optim.NAdam, {}),
}

#: of two groups; their numbers cannot be halved evenly, and cut through a matrix
SHAPES = [[(3, 5), (2, 2)], [(7,), (2, 3, 3, 1), (1,)]]


def _groups() -> list[dict[str, object]]:
    torch.manual_seed(0)
    made = [[nn.Parameter(torch.randn(shape)) for shape in shapes] for shapes in SHAPES]
    return [{"params": params, "lr": 0.1 / (1 + index)} for index, params in enumerate(made)]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _step(
    optimizers: list[torch.optim.Optimizer], schedules: list[torch.optim.lr_scheduler.LRScheduler], step: int
) -> None:
    """The same gradients for all; something else than the optimizer halves one weight."""
    for optimizer in optimizers:
        for index, p in enumerate(_parameters(optimizer)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index))
        optimizer.step()
        with torch.no_grad():
            _parameters(optimizer)[step % 5].mul_(0.5)
    for schedule in schedules:
        schedule.step()


def _assert_same(ours: torch.optim.Optimizer, plain: torch.optim.Optimizer) -> None:
    for a, b in zip(_parameters(ours), _parameters(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    one, other = ours.state_dict(), plain.state_dict()
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for number, values in other["state"].items():
        torch.testing.assert_close(one["state"][number], values, rtol=0, atol=1e-6)


def _work(rank: int, folder: str) -> None:
    """One of two processes; what it raises ends the test."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, (kind, settings) in OPTIMIZERS.items():
        ways = [(way, copies) for way in WAYS for copies in (True, False)] if name == "AdamW" else [(Zero(2), True)]
        for way, copies in ways:
            plain = kind(_groups(), **settings)
            ours = ZeroOptimizer(kind(_groups(), **settings), way, device, keeps_copies=copies)
            # whether its weights are the parameters themselves
            weight, parameter = ours._weights.weights[0], _parameters(ours)[0]
            assert (weight.data_ptr() == parameter.data_ptr()) is not copies
            assert (ours.numbers_here < 26) == (way.stage > 0)
            both = [plain, ours]
            schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in both]
            for step in range(2):
                _step(both, schedules, step)
            _assert_same(ours, plain)
            # whole states go from one kind to the other
            without = kind(_fresh(ours), **settings)
            without.load_state_dict(copy.deepcopy(ours.state_dict()))
            after = ZeroOptimizer(kind(_fresh(plain), **settings), way, device, keeps_copies=copies)
            after.load_state_dict(copy.deepcopy(plain.state_dict()))
            _step([*both, without, after], [], 2)
            for other in (ours, without, after):
                _assert_same(other, plain)
    # DyLoRA
    _parameters(ours)[1].requires_grad_(False)
    with pytest.raises(UserError, match="leaves some of its weights out .*leave DeepSpeed out"):
        ours.step()
    torch.distributed.destroy_process_group()


def _fresh(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """Groups of copies of its weights."""
    return [{"params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups]


@pytest.mark.slow
def test_pieces_are_the_whole(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    torch.multiprocessing.spawn(_work, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.Adagrad])
def test_optimizers_that_look_at_whole_weights_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = kind([nn.Parameter(torch.zeros(2, 2))], lr=0.1)
    if kind in (torch.optim.AdamW, torch.optim.SGD):
        check_optimizer(optimizer)
        return
    with pytest.raises(UserError, match=f"--optimizer_type {kind.__name__}: DeepSpeed .* leave DeepSpeed out"):
        check_optimizer(optimizer)
