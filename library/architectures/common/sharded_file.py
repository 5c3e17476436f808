"""Read safetensors weights in one file or in several shards as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from library.architectures.common.diffusers_folder import read_json, weight_file
from library.architectures.common.tensor_files import Shapes, TensorFile, WeightFile
from library.errors import UserError
from library.files.safetensors_io import TensorReader, is_pickle, read_header, torch_dtype

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_INDEX_ENDING = ".safetensors.index.json"


def is_shard(path: Path) -> bool:
    """Whether a file name is that of a shard, ``...-00001-of-00003.safetensors``."""
    return _SHARD.fullmatch(path.name) is not None


def open_weights(path: Path) -> WeightFile:
    """Open a file, a shard with the others beside it, or a component's folder. Raises UserError as their ``open``."""
    return ShardedFile.open(path) if path.is_dir() or is_shard(path) else TensorFile.open(path)


@dataclass(frozen=True)
class ShardedFile(WeightFile):
    """Weights whose names, shapes and dtypes are known; tensors are read when asked for.

    Attributes:
        path: the given file or folder.
        where: the file of each tensor.
        mapped: whether tensors are views of the mapped files.
    """

    path: Path
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    where: Mapping[str, Path] = field(repr=False)
    mapped: bool = True

    @staticmethod
    def open(path: Path) -> ShardedFile:
        """Find the files and read their headers.

        Args:
            path: a file, any shard of several, or a component's folder.

        Raises:
            UserError: a file or shard is missing, torn, or no safetensors file; a tensor of the index is nowhere.
        """
        files, listed = _files(path)
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        where: dict[str, Path] = {}
        for file in files:
            for name, info in read_header(file).tensors.items():
                shapes[name], where[name] = tuple(info.shape), file
                dtypes[name] = torch_dtype(info, f"{file}: {name}")
        if lost := sorted(set(listed) - set(shapes)):
            raise UserError(
                f"{path}: {len(lost)} tensors of the index are in no shard, the first is {lost[0]}; download it again"
            )
        return ShardedFile(path, shapes, dtypes, where)

    @property
    def files(self) -> set[Path]:
        return set(self.where.values())

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        with ExitStack() as stack:
            readers: dict[Path, TensorReader] = {}

            def read(name: str) -> Tensor:
                file = self.where[name]
                if file not in readers:
                    readers[file] = stack.enter_context(TensorReader(file, mapped=self.mapped))
                return readers[file].read(name)

            yield read


def _files(path: Path) -> tuple[list[Path], Iterable[str]]:
    """Return the files of the weights, and the tensors that an index lists."""
    if path.is_dir():
        indices = sorted(path.glob(f"*{_INDEX_ENDING}"))
        # a half-precision variant has its own index, "...fp16.safetensors.index.json"
        index = min(indices, key=lambda found: len(found.name), default=None)
        if index is not None:
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise UserError(f"{index}: has no weight_map; download it again")
            return _present(path, set(listed.values())), listed
        first = min(path.glob("*-00001-of-*.safetensors"), key=lambda found: len(found.name), default=None)
        path = first if first is not None else weight_file(path)
    if is_pickle(path):
        raise UserError(f"{path}: a pickled file; convert it to .safetensors first")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if shard := _SHARD.fullmatch(path.name):
        count = int(shard["count"])
        names = {f"{shard['stem']}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
        return _present(path.parent, names), ()
    return [path], ()


def _present(folder: Path, names: set[str]) -> list[Path]:
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UserError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); download the folder again"
        )
    return [folder / name for name in sorted(names)]
