"""Move modules between host and device: nothing else does, which ``tests/memory/test_placing.py`` checks.

``library/memory/plan.py`` decides where each part of a model is; its blocks, shards and small forms are placed by the
files of this folder that make them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

#: attribute of a module that computes where it was loaded, whatever the run's device is
STAYS = "stays_where_it_is"

M = TypeVar("M", bound=nn.Module)


def move(module: M, device: torch.device | str, dtype: torch.dtype | None = None) -> M:
    """Move a module to stay there, and return it.

    Args:
        dtype: of its floating-point weights from now on; ``None`` keeps theirs.
    """
    with torch.inference_mode(False):  # weights that are moved in it could not be moved again outside of it
        return module.to(device=device, dtype=dtype)


@contextlib.contextmanager
def stage(device: torch.device, *modules: nn.Module | None) -> Iterator[None]:
    """Have frozen modules on a device within the context; each is where it was afterwards.

    Nothing is copied back, because frozen weights are the same there: a module whose home is the host keeps its memory
    there, and that of the device is freed.

    Args:
        modules: those that are ``None``, there already, or marked as ``STAYS`` are left alone.
    """
    lent: dict[int, Tensor] = {}  # tensors by the id of those that they stand for, which several modules may share
    homes = [place for module in modules for place in _away(module, device)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for table, name, home in homes:
                if id(home) not in lent:
                    there = home.to(device)
                    lent[id(home)] = (
                        nn.Parameter(there, requires_grad=False) if isinstance(home, nn.Parameter) else there
                    )
                table[name] = lent[id(home)]
        yield
    finally:
        for table, name, home in homes:
            table[name] = home


def _away(module: nn.Module | None, device: torch.device) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield the tensors of a module that are elsewhere, each with its name in a table of parameters or buffers."""
    if module is None or getattr(module, STAYS, False):
        return
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.device != device:
                    yield table, name, tensor
