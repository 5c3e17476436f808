"""Two-way maps between the tensor names and layouts of a file and of a model.

A map is a table of (file prefix, model prefix) pairs, read in both directions, so that what is loaded and what is
saved cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class KeyMap:
    """Renames whole dotted components; the longest matching prefix of the table wins."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self._to_model = dict(pairs)
        self._to_file = {model: file for file, model in pairs}
        assert len(self._to_model) == len(self._to_file) == len(pairs), "each name must stand once on each side"

    def to_model(self, file_name: str) -> str | None:
        """Return the model's name, or None if the table does not have the file's."""
        return _rename(file_name, self._to_model)

    def to_file(self, model_name: str) -> str | None:
        """Return the file's name, or None if the table does not have the model's."""
        return _rename(model_name, self._to_file)


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    end = len(name)
    while end > 0:
        renamed = table.get(name[:end])
        if renamed is not None:
            return renamed + name[end:]
        end = name.rfind(".", 0, end)
    return None


@dataclass(frozen=True)
class TensorLayout:
    """The layout of one model's tensors in a file.

    Attributes:
        keys: names below ``prefix``.
        prefix: what precedes every name in the file, e.g. ``"first_stage_model."``.
        stacked: (file leaf, model leaves) of tensors that the file holds joined along the first axis.
        conv_linears: endings of the model's linear weights (out, in) that the file holds as 1x1 convolutions
            (out, in, 1, 1).
        transposed: the model's linear weights (out, in) that the file holds as (in, out).
    """

    keys: KeyMap
    prefix: str = ""
    stacked: tuple[tuple[str, tuple[str, ...]], ...] = ()
    conv_linears: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()

    def model_names(self, file_name: str) -> tuple[str, ...]:
        """Return the model's tensors that one tensor of the file holds; empty if the model does not use it."""
        if not file_name.startswith(self.prefix):
            return ()
        name = self.keys.to_model(file_name[len(self.prefix) :])
        if name is None:
            return ()
        for leaf, parts in self.stacked:
            if name.endswith(f".{leaf}"):
                stem = name[: -len(leaf)]
                return tuple(stem + part for part in parts)
        return (name,)

    def read(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Convert the file's (name, tensor) pairs to the model's; no data is copied."""
        for file_name, tensor in tensors:
            names = self.model_names(file_name)
            if len(names) > 1:
                yield from zip(names, tensor.chunk(len(names)), strict=True)
            for name in names[:1] if len(names) == 1 else ():
                is_conv = tensor.dim() == 4 and name.endswith(self.conv_linears)
                if name in self.transposed:
                    tensor = tensor.t()
                yield name, tensor.reshape(tensor.shape[:2]) if is_conv else tensor

    def write(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Convert the model's tensors to the file's (name, tensor) pairs: the inverse of ``read``.

        Raises:
            KeyError: the model holds a tensor that the layout has no name for.
        """
        for name, tensor in state.items():
            joined = next(((leaf, parts) for leaf, parts in self.stacked if name.endswith(parts)), None)
            if joined is not None:
                leaf, parts = joined
                if not name.endswith(parts[0]):
                    continue  # written together with the first part
                stem = name[: -len(parts[0])]
                name, tensor = stem + leaf, torch.cat([state[stem + part] for part in parts])
            elif tensor.dim() == 2 and name.endswith(self.conv_linears):
                tensor = tensor.reshape(*tensor.shape, 1, 1)
            elif name in self.transposed:
                tensor = tensor.t()
            file_name = self.keys.to_file(name)
            if file_name is None:
                raise KeyError(f"the file layout has no name for the tensor {name}")
            yield self.prefix + file_name, tensor

    def groups(self, state: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """The model's tensors, together where the file holds them as one."""
        for name in state:
            joined = next((parts for _, parts in self.stacked if name.endswith(parts)), None)
            if joined is None:
                yield (name,)
            elif name.endswith(joined[0]):
                stem = name[: -len(joined[0])]
                yield tuple(stem + part for part in joined)
