"""Write and read the weights in a state folder one tensor at a time.

accelerate builds the bytes of a whole file before it writes them, which for a whole model is a second copy in host
memory. The files are the same: ``model.safetensors``, ``model_1.safetensors``, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.files.gathering import is_sharded, shard_of, shards_of, whole, write_together
from library.files.safetensors_io import iterate_tensors
from library.files.streamed import tensor_info, write_streamed

if TYPE_CHECKING:
    from accelerate import Accelerator


def stream_weights(accelerator: Accelerator) -> None:
    """Make the accelerator write and read the weights of its models one tensor at a time."""

    def save(models: list[nn.Module], weights: list[Mapping[str, Tensor]], folder: str) -> None:
        def write() -> None:
            for number, state in enumerate(weights):
                infos = {name: tensor_info(t.dtype, tuple(t.shape)) for name, t in state.items()}
                write_streamed(_file(folder, number), infos, partial(_whole, state), {"format": "pt"})

        if shards := shards_of(models):
            write_together(write, shards, accelerator.device)
        elif accelerator.is_main_process:
            write()
        weights.clear()  # so that accelerate has none to write

    def load(models: list[nn.Module], folder: str) -> None:
        for number, model in enumerate(models):
            _load(accelerator.unwrap_model(model), _file(folder, number))
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _whole(state: Mapping[str, Tensor], name: str) -> Tensor:
    return whole(state[name])


def _file(folder: str, number: int) -> Path:
    return Path(folder) / (f"model_{number}.safetensors" if number else "model.safetensors")


@torch.no_grad()
def _load(model: nn.Module, file: Path) -> None:
    """Copy a file's tensors into a module.

    Raises:
        RuntimeError: other names or shapes than the module's, as in ``load_state_dict``.
    """
    own: dict[str, Any] = model.state_dict()
    missing = set(own)
    for name, tensor in iterate_tensors(file):
        if name not in own:
            raise RuntimeError(f"unexpected tensor {name}")
        if own[name].shape != tensor.shape:
            raise RuntimeError(f"size mismatch for {name}: {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
        if is_sharded(own[name]):
            shard = shard_of(own[name])
            shard.local.copy_(shard.rows_of(tensor))
        else:
            own[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise RuntimeError(f"missing tensors: {', '.join(sorted(missing)[:3])}")
