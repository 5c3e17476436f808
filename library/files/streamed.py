"""Write safetensors files tensor by tensor, so that a model is never in memory as a whole."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.errors import UserError
from library.files.atomic import atomic_path
from library.files.precisions import cast
from library.files.safetensors_io import TensorInfo, dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

#: alignment of the data in bytes, as in safetensors' own writer
_ALIGNMENT = 8


def tensor_info(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInfo:
    """Return what ``write_streamed`` must know about a tensor beforehand."""
    return TensorInfo(dtype_name(dtype), tuple(shape))


def data_bytes(info: TensorInfo) -> int:
    """Return the size of a tensor in a file, in bytes."""
    return math.prod(info.shape) * torch_dtype(info, "tensor").itemsize


def check_target(
    path: Path,
    flag: str,
    *,
    sources: Iterable[Path] = (),
    needed: int = 0,
    suffixes: Collection[str] = (".safetensors",),
) -> None:
    """Check before the work whether a file can be written.

    Args:
        flag: the option that named it, for messages.
        sources: input files, and folders with input files, which must not be overwritten.
        needed: bytes. An existing file stays until the new one is complete, so its space does not count as free.

    Raises:
        UserError: one of the sources, a name of another kind, a folder, no such parent folder, or too little space.
    """
    if path.suffix not in suffixes:
        raise UserError(f"{flag} {path}: the file's name must end with {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{flag} {path}: a folder; give a file name")
    check_folder_of(path, flag)
    for source in sources:
        inside = source.is_dir() and path.exists() and path.resolve().is_relative_to(source.resolve())
        if inside or path.resolve() == source.resolve():
            raise UserError(f"{flag} {path}: is one of the files that are read; give another name")
    free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise UserError(
            f"{flag} {path}: {needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free; "
            "make room, write elsewhere, or give a smaller --save_precision"
        )


def check_folder_of(path: Path, flag: str) -> None:
    """Raise UserError if the folder of ``path`` does not exist; ``flag`` is the option that named it."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: the folder {path.absolute().parent} does not exist; make it first")


def write_streamed(
    path: Path | str,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    writes: bool = True,
) -> None:
    """Write a safetensors file atomically, holding one tensor at a time.

    Several processes may take part, where each has a part of every tensor: all call it alike, ``produce`` gathers a
    tensor from all of them, and one of them writes.

    Args:
        infos: dtype and shape of every tensor.
        produce: returns the tensor of a name; called once for each, in the order of the file: wide dtypes first, so
            that all are aligned, then by name.
        progress: called with the tensors written and their number.
        writes: whether this process writes; the others only produce the tensors, in the same order.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    order = sorted(infos, key=lambda name: (-torch_dtype(infos[name], name).itemsize, name))
    if not writes:
        for name in order:
            produce(name)
        return
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + data_bytes(infos[name])
        header[name] = {"dtype": infos[name].dtype, "shape": list(infos[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(order, start=1):
            # the tensor has no name here, so that it is freed before the next one is made
            stream.write(_bytes(produce(name), infos[name], name))
            if progress is not None:
                progress(done, len(order))


def _bytes(tensor: Tensor, expected: TensorInfo, name: str) -> memoryview:
    import torch

    given = tensor_info(tensor.dtype, tuple(tensor.shape))
    assert given == expected, f"{name} was announced as {expected} and is {given}"
    return memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())


class Described(Protocol):
    """Weights whose files, names, shapes and dtypes are known, such as a ``ShardedFile``."""

    @property
    def files(self) -> Collection[Path]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...


def write_model(
    path: Path,
    source: Described,
    produce: Callable[[str], Tensor],
    *,
    flag: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model tensor by tensor, each made by ``produce`` from its name just before.

    Args:
        source: names, shapes and, where ``dtype`` is None, dtypes of the tensors to write.
        flag: the option that named ``path``, for messages.
        dtype: of all tensors that are not integers.

    Raises:
        UserError: the disk has no room, which is found before anything is written, or is not writable.
    """
    infos = {}
    for name, shape in source.shapes.items():
        own = source.dtypes[name]
        infos[name] = tensor_info(dtype if dtype is not None and own.is_floating_point else own, shape)
    check_target(path, flag, sources=source.files, needed=sum(map(data_bytes, infos.values())))
    write_streamed(
        path,
        infos,
        lambda name: produce(name) if dtype is None else cast(produce(name), dtype),
        metadata,
        progress=progress,
    )
    logger.info("saved: %s, %.2f GB", path, path.stat().st_size / 1e9)
