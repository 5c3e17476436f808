"""Parts of weights in two processes: norms, flags and states are those of the whole."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.files.gathering import shards_of, whole, write_together
from library.memory.sharding import Sharding, shard_model
from library.optim.shards import LocalShards, SharedStates

CPU = torch.device("cpu")


def _model() -> nn.Module:
    """Rows that cannot be halved, one row that one process has alone, and a layer that stays whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1), nn.Linear(1, 3))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None) -> None:
    """One process has one of two inputs, or both."""
    inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    model(inputs if rank is None else inputs[rank : rank + 1]).square().mean().backward()


def _work(rank: int, folder: str) -> None:
    """One of two processes; what it raises ends the test."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _check(rank, folder)
    gc.collect()  # sharded models hold their group, whose threads end with it and not with the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _check(rank: int, folder: str) -> None:
    plain, model = _model(), _model()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    shard_model(model, ["Linear"], Sharding(kept_whole="2"), CPU)
    names = [name for name, _ in model.named_parameters()]
    shards = LocalShards(model.parameters(), CPU)
    own = {name: shards.local(p) for name, p in model.named_parameters()}
    assert [p in shards for p in own.values()] == [True] * 4 + [False] * 2
    assert own["1.weight"].numel() == (5 if rank == 0 else 0)
    optimizer = torch.optim.AdamW(own.values(), lr=0.1)
    states = SharedStates(optimizer, shards)

    for _ in range(2):
        _step(plain, plain_optimizer, None)
        _step(model, optimizer, rank)
        shards.take_gradients()
        for name in ("2.weight", "2.bias"):
            torch.distributed.all_reduce(own[name].grad)
            own[name].grad /= 2
        norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        torch.testing.assert_close(shards.norm(list(own.values())), norm)
        for each in (plain_optimizer, optimizer):
            each.step()
            each.zero_grad()

    # whole tensors, on the first process
    found: dict[str, torch.Tensor] = {}
    state = model.state_dict()

    def read() -> None:
        found.update({name: whole(state[name]).clone() for name in reversed(names)})

    with pytest.raises(RuntimeError, match="read by one process alone"):
        whole(state["0.weight"])
    write_together(read, shards_of([model]), CPU)
    assert list(found) == (list(reversed(names)) if rank == 0 else [])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=0, atol=1e-6)

    # what the first process cannot write is an error of all
    def fail() -> None:
        whole(state["0.weight"])
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        write_together(fail, shards_of([model]), CPU)

    # states are written whole, and each process reads its part
    file = Path(folder) / "optimizer.bin"
    states.write(file)
    torch.distributed.barrier()
    saved, expected = torch.load(file, weights_only=True), plain_optimizer.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(saved["state"], expected["state"], rtol=0, atol=1e-6)
    assert optimizer.state_dict()["state"] == {}
    before = copy.deepcopy({name: optimizer.state[p] for name, p in own.items()})
    optimizer.state.clear()
    optimizer.load_state_dict(torch.load(file, mmap=True, weights_only=True))
    for name, parameter in own.items():
        torch.testing.assert_close(optimizer.state[parameter], before[name], rtol=0, atol=0)

    # flags of one process are flags of all
    assert bool(shards.everywhere(torch.tensor(True)))
    assert not bool(shards.everywhere(torch.tensor(rank == 0)))
    for parameter in own.values():
        parameter.grad = torch.zeros_like(parameter)
    shards.share_infinity(list(own.values()))
    assert all(bool(p.grad.isfinite().all()) for p in own.values())
    own["0.weight"].grad[0, 0] = torch.nan if rank == 1 else 0.0
    shards.share_infinity(list(own.values()))
    assert not all(bool(p.grad.isfinite().all()) for p in own.values())


def test_parts_are_the_whole(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_work, args=(str(tmp_path),), nprocs=2)


def test_without_shards_nothing_changes() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    shards = LocalShards(parameters, CPU)
    assert not shards and all(shards.local(p) is p for p in parameters)
    flag = torch.tensor(False)
    assert shards.everywhere(flag) is flag
    assert whole(parameters[0]) is parameters[0]
