"""The weights of a model to merge or extract: a file of any kind, or a diffusers folder read as one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from library.architectures.adapters import AdapterFamily
from library.architectures.common.diffusers_folder import weight_file
from library.architectures.common.sharded_file import ShardedFile
from library.architectures.common.tensor_files import Shapes, TensorFile, WeightFile
from library.architectures.registry import adapter_families
from library.errors import UserError
from library.files.safetensors_io import is_pickle
from networks.files.families import family_of_model

#: parts of a diffusers folder that adapters change
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class FolderModel(WeightFile):
    """The components of a diffusers folder as one model; names begin with the name of the component."""

    path: Path
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    _components: Mapping[str, ShardedFile] = field(repr=False)
    mapped: bool = True

    @staticmethod
    def open(path: Path) -> FolderModel:
        components = {name: _component(path / name) for name in _COMPONENTS if (path / name).is_dir()}
        if not components:
            raise UserError(f"{path}: a folder without {', '.join(_COMPONENTS)}; not a model in diffusers' layout")
        shapes = {f"{part}.{name}": s for part, file in components.items() for name, s in file.shapes.items()}
        dtypes = {f"{part}.{name}": d for part, file in components.items() for name, d in file.dtypes.items()}
        return FolderModel(path, shapes, dtypes, components)

    @property
    def files(self) -> set[Path]:
        return {file for component in self._components.values() for file in component.files}

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        with ExitStack() as stack:
            readers = {
                part: stack.enter_context(replace(file, mapped=self.mapped).opened())
                for part, file in self._components.items()
            }

            def read(name: str) -> Tensor:
                part, _, own = name.partition(".")
                return readers[part](own)

            yield read


def _component(folder: Path) -> ShardedFile:
    return ShardedFile.open(folder if any(folder.glob("*.index.json")) else weight_file(folder))


Model = WeightFile


def open_model(path: Path, *, mapped: bool = True) -> Model:
    """Open a model in a single file, in shards, in a pickle, or in a diffusers folder.

    Raises:
        UserError: no such file or folder, or no weights in it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for family in adapter_families():
        if family.opens is not None and (found := family.opens(path)) is not None:
            return replace(found, mapped=mapped)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return replace(FolderModel.open(path), mapped=mapped)
    if path.is_file() and is_pickle(path):
        return TensorFile.open(path)
    return replace(ShardedFile.open(path), mapped=mapped)


def family_of(model: Model) -> AdapterFamily:
    """Return the family of a model. Raises UserError if it is of no family."""
    family = family_of_model(model.shapes)
    if family is None:
        example = next(iter(model.shapes), "nothing")
        raise UserError(f"{model.path}: no model that adapters are known for (it holds {example}, ...)")
    return family


@dataclass(frozen=True)
class RoundedModel(WeightFile):
    """A model whose tensors are rounded to a dtype as they are read."""

    model: WeightFile
    dtype: torch.dtype

    @property
    def path(self) -> Path:  # type: ignore[override]
        return self.model.path

    @property
    def shapes(self) -> Shapes:  # type: ignore[override]
        return self.model.shapes

    @property
    def files(self) -> set[Path]:
        return self.model.files

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        with self.model.opened() as read:
            yield lambda name: read(name).to(self.dtype)


def rounded_to(model: WeightFile, dtype: torch.dtype) -> RoundedModel:
    """Return the model as if it had been saved in ``dtype``."""
    return RoundedModel(model, dtype)
