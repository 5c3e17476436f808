"""Inspect and stream weight files in one way, whether safetensors or pickled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.files.safetensors_io import TensorReader, is_pickle, known_dtype, load_pickle, read_header

Shapes = Mapping[str, tuple[int, ...]]


class WeightFile(ABC):
    """Weights with known names and shapes, in one file or in several, possibly under other names there; a dataclass."""

    path: Path
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    mapped: bool  # whether tensors are views of the mapped files
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def files(self) -> set[Path]:
        """Return all files of the weights."""
        return {self.path}

    @abstractmethod
    def opened(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """Yield a function that reads a tensor by its name, on the host; files stay open within the context."""

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Stream the named tensors in order, on the host, one at a time."""
        with self.opened() as read:
            for name in names:
                yield name, read(name)

    def on_meta(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Return the same names with tensors on the meta device, of the same shapes and dtypes; the files are not
        read."""
        for name in names:
            yield name, torch.empty(self.shapes[name], dtype=self.dtypes.get(name), device="meta")


@dataclass(frozen=True)
class TensorFile(WeightFile):
    """A weight file."""

    path: Path
    shapes: Shapes
    _unpickled: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    mapped: bool = True  # whether tensors are views of the mapped file
    #: only tensors with a dtype that torch has
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(path: Path) -> TensorFile:
        """Read names and shapes; the format is recognized by content, not by name.

        Raises:
            UserError: the file is torn, not a weight file, or a pickle that holds more than tensors.
        """
        if is_pickle(path):
            tensors = load_pickle(path)
            dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            return TensorFile(path, shapes, tensors, dtypes=dtypes)
        infos = read_header(path).tensors
        dtypes = {name: dtype for name, info in infos.items() if (dtype := known_dtype(info)) is not None}
        return TensorFile(path, {name: tuple(info.shape) for name, info in infos.items()}, dtypes=dtypes)

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        if self._unpickled is not None:
            yield self._unpickled.__getitem__
            return
        with TensorReader(self.path, mapped=self.mapped) as reader:
            yield reader.read
