"""Write whole models to files: each tensor is made when it is written, so that no second model is in memory.

A tensor that is sharded over processes is gathered at that moment, see ``library.files.gathering``.

Parts that were not trained are copied from their files bit by bit, whatever dtype they have in the run. Other contents
of such a file, such as averaged weights, are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from library.architectures.common.key_map import TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.tensor_files import WeightFile
from library.errors import UserError
from library.files.gathering import whole
from library.files.precisions import cast
from library.files.safetensors_io import save_pickle
from library.files.streamed import tensor_info, write_streamed


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


LazyTensors = dict[str, LazyTensor]


def as_they_are(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the tensors under their own names."""
    return {name: _kept(tensor) for name, tensor in tensors.items()}


def _kept(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: whole(tensor))


def laid_out(layout: TensorLayout, state: Mapping[str, Tensor]) -> LazyTensors:
    """Return a model's tensors in the layout of a file; tensors that the file joins are joined when they are written.

    Raises:
        KeyError: the layout has no name for a tensor of the model.
    """
    found = {}
    for names in layout.groups(state):
        part = {name: state[name] for name in names}
        like = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in part.items()}
        ((name, shown),) = layout.write(like)
        found[name] = LazyTensor(tuple(shown.shape), shown.dtype, _made(layout, part))
    return found


def _made(layout: TensorLayout, part: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: next(layout.write({name: whole(tensor) for name, tensor in part.items()}))[1]


def own_tensors(source: ModelSource) -> dict[str, Tensor]:
    """Return a part's tensors in its file by the model's names; views of the file if it is mapped."""
    return dict(source.layout.read(_mapped(source.file).read(source.file_names())))


def whole_file(file: WeightFile) -> LazyTensors:
    """Return all tensors of a file."""
    return as_they_are(dict(_mapped(file).read(list(file.shapes))))


def _mapped(file: WeightFile) -> WeightFile:
    return replace(file, mapped=True)


def state_of(name: str, parts: Mapping[str, ModelSource], trained: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
    """Return the tensors of a part by the model's names: trained ones, or those of its file."""
    return trained[name].state_dict() if name in trained else own_tensors(parts[name])


def like_its_source(
    file: WeightFile,
    parts: Mapping[str, ModelSource],
    trained: Mapping[str, nn.Module],
    layouts: Mapping[str, TensorLayout],
) -> LazyTensors:
    """Return the tensors of the model's source file, with the trained parts instead of its own.

    Args:
        layouts: for parts from other files, such as that of ``--vae``.
    """
    tensors = whole_file(file)
    for name, source in parts.items():
        if name in trained:
            tensors |= laid_out(source.layout, trained[name].state_dict())
        elif source.file.path != file.path:
            prefix = layouts[name].prefix
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
            tensors |= laid_out(layouts[name], own_tensors(source))
    return tensors


# ---- files ----


def write_file(
    path: Path,
    tensors: LazyTensors,
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    counters: Mapping[str, int],
) -> None:
    """Write one ``.safetensors`` or ``.ckpt`` file, completely or not at all.

    Args:
        dtype: cast floating-point tensors to it; ``None`` keeps each one's own.
        metadata: of a ``.safetensors`` file.
        counters: saved in a ``.ckpt`` file beside its ``state_dict``: ``epoch`` and ``global_step``.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, dtype=dtype, metadata=metadata)
        return
    state = {name: _cast(tensor, dtype).to("cpu").contiguous() for name, tensor in tensors.items()}
    save_pickle(path, {"state_dict": state, **counters})


def write_tensors(path: Path, tensors: LazyTensors, *, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
    """Write one ``.safetensors`` file, or with another extension a pickled dict of the tensors alone.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    if path.suffix == ".safetensors":
        infos = {name: tensor_info(_target(t, dtype), t.shape) for name, t in tensors.items()}
        write_streamed(path, infos, lambda name: _cast(tensors[name], dtype), metadata)
        return
    save_pickle(path, {name: _cast(tensor, dtype).to("cpu").contiguous() for name, tensor in tensors.items()})


def _target(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def _cast(tensor: LazyTensor, dtype: torch.dtype | None) -> Tensor:
    made = tensor.make().detach()
    return cast(made, dtype) if dtype is not None and made.is_floating_point() else made


def files_of(parts: Mapping[str, ModelSource]) -> Iterator[Path]:
    """Return every file that the parts were loaded from."""
    for source in parts.values():
        yield from source.file.files


def refuse_own_source(path: Path, parts: Mapping[str, ModelSource]) -> None:
    """Raise UserError if a save would replace a file that the model is read from."""
    places = {file.resolve() for file in files_of(parts)}
    inside = {place for file in places for place in (file, *file.parents)}
    if path.resolve() in (inside if path.is_dir() else places):
        raise UserError(
            f"--output_name: the model would overwrite {path}, from which it is read; give another name or --output_dir"
        )
