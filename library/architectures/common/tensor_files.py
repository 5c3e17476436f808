"""One way to look into and stream from weight files, whether safetensors or pickled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from library.files.safetensors_io import iterate_tensors, load_pickle, read_header

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
Shapes = Mapping[str, tuple[int, ...]]


class WeightFile(Protocol):
    """Weights of known names and shapes, in one file or in several, maybe under other names there; a dataclass."""

    path: Path
    shapes: Shapes
    mapped: bool

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]: ...

    def on_meta(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class TensorFile:
    """A weight file whose names and shapes are known; tensors are read when asked for."""

    path: Path
    shapes: Shapes
    _unpickled: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    mapped: bool = True  # whether tensors are views of the mapped file

    @staticmethod
    def open(path: Path) -> TensorFile:
        """Read names and shapes.

        Raises:
            UserError: the file is torn, not a weight file, or a pickle that holds more than tensors.
        """
        if path.suffix.lower() in PICKLE_SUFFIXES:
            tensors = load_pickle(path)
            return TensorFile(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors)
        header = read_header(path)
        return TensorFile(path, {name: tuple(info.shape) for name, info in header.tensors.items()})

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Stream the named tensors in order, on the host, one at a time."""
        if self._unpickled is not None:
            for name in names:
                yield name, self._unpickled[name]
        else:
            yield from iterate_tensors(self.path, names, mapped=self.mapped)

    def on_meta(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The same without data: tensors of their shapes on the meta device; the file is not touched."""
        for name in names:
            yield name, torch.empty(self.shapes[name], device="meta")
