"""The names of a family's adapters in files: one description for the trainer, the loader and every file tool.

A denoiser has two sets of module paths: those of its original checkpoint and those of diffusers. Most modules exist in
both. Joint projections (FLUX.1's ``qkv``, ``linear1``) are several modules in diffusers: they share the input, and
their outputs are rows of the joint module's outputs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Naming = Literal["kohya", "diffusers", "peft", "comfyui"]
NAMINGS: tuple[Naming, ...] = ("kohya", "diffusers", "peft", "comfyui")
#: whose module paths a naming has
Space = Literal["original", "diffusers"]
Shapes = Mapping[str, tuple[int, ...]]

#: prefix of every name in files that PEFT itself wrote
PEFT_ROOT = "base_model.model."


@dataclass(frozen=True)
class Place:
    """A module of diffusers in the original checkpoint: all rows of ``path``, or those of part ``index``."""

    path: str
    index: int = 0


class ModulePaths(ABC):
    """Two-way map between original module paths and diffusers'."""

    #: words of paths: published names have ``_`` for ``.``, and only a list of words tells which ``_`` is a dot
    words: frozenset[str]

    def __init__(self, words: Iterable[str]) -> None:
        self.words = frozenset(words)
        longest_first = sorted(self.words, key=len, reverse=True)
        self._component = re.compile(rf"({'|'.join(map(re.escape, longest_first))}|\d+)(?:_|$)")

    @abstractmethod
    def to_diffusers(self, original: str) -> tuple[str, ...]:
        """Return diffusers' modules that make up an original one, in the order of its rows; empty if it is unknown."""

    @abstractmethod
    def to_original(self, diffusers: str) -> Place | None:
        """Return where a module of diffusers is in the original checkpoint; None if it is unknown."""

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        """Return the number of rows of each module from ``to_diffusers``, given the joint module's inputs and outputs.

        ``outputs`` may be left out for joint modules, where not all parts are known.
        """
        assert outputs is not None and len(self.to_diffusers(original)) == 1
        return [outputs]

    def swaps_halves(self, original: str) -> bool:
        """Whether diffusers has the second half of the module's rows first."""
        return False

    def dotted(self, underscored: str) -> str | None:
        """Return ``a_b_0_c`` as the path ``a_b.0.c``; None if it has words that are not this model's."""
        components, position = [], 0
        while position < len(underscored):
            found = self._component.match(underscored, position)
            if found is None:
                return None
            components.append(found[1])
            position = found.end()
        path = ".".join(components)
        return path if path.replace(".", "_") == underscored else None

    def bare_roots(self, space: Space) -> frozenset[str]:
        """Return how paths begin, for files that leave out the name of the model."""
        return frozenset()

    def _is_known(self, path: str) -> bool:
        return all(part in self.words or part.isdigit() for part in path.split("."))


def with_published_ending(name: str, endings: Mapping[str, str]) -> str:
    """Return a module's name with its ending of another program, after a number, as the published one."""
    found = re.fullmatch(r"(.*_\d+_)(\D.*)", name)
    return f"{found[1]}{endings.get(found[2], found[2])}" if found else name


class TablePaths(ModulePaths):
    """A transformer whose layers a table names: published layer -> diffusers' layers, in the order of its rows.

    Args:
        table: paths with ``{}`` for the number of a block.
        swapped: published layers whose halves diffusers has the other way round.
        own_roots: what published paths alone begin with, in files without the name of the model; all of the table's,
            if not given, and then diffusers' too.
    """

    def __init__(
        self,
        table: Mapping[str, tuple[str, ...]],
        *,
        swapped: frozenset[str] = frozenset(),
        own_roots: frozenset[str] | None = None,
    ) -> None:
        paths = [*table, *(part for parts in table.values() for part in parts)]
        super().__init__({word for path in paths for word in path.split(".") if word != "{}" and not word.isdigit()})
        self._table, self._swapped, self._own_roots = table, swapped, own_roots
        self._places = {part: Place(path, i) for path, parts in table.items() for i, part in enumerate(parts)}
        lists = {path.partition(".{}")[0] for path in paths if "{}" in path}
        self._block = re.compile(rf"({'|'.join(sorted(map(re.escape, lists), key=len, reverse=True))})\.(\d+)\.")

    def _numbered(self, path: str) -> tuple[str, str]:
        """Return (path with ``{}`` for the first number below a list of blocks, that number)."""
        found = self._block.match(path)
        return (f"{found[1]}.{{}}{path[found.end() - 1 :]}", found[2]) if found else (path, "")

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        template, number = self._numbered(original)
        return tuple(part.replace("{}", number) for part in self._table.get(template, ()))

    def to_original(self, diffusers: str) -> Place | None:
        template, number = self._numbered(diffusers)
        place = self._places.get(template)
        return None if place is None else Place(place.path.replace("{}", number), place.index)

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        parts = len(self.to_diffusers(original))
        return super().rows(original, inputs=inputs, outputs=outputs) if parts == 1 else [inputs] * parts

    def bare_roots(self, space: Space) -> frozenset[str]:
        if self._own_roots is not None:
            return self._own_roots if space == "original" else frozenset()
        paths = self._table if space == "original" else self._places
        return frozenset(path.partition(".")[0] for path in paths)

    def swaps_halves(self, original: str) -> bool:
        return original in self._swapped


class SamePaths(ModulePaths):
    """Text encoders: every program uses transformers' paths."""

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        return (original,) if self._is_known(original) else ()

    def to_original(self, diffusers: str) -> Place | None:
        return Place(diffusers) if self._is_known(diffusers) else None


# ---- one model of a family ----


@dataclass(frozen=True)
class WeightPlace:
    """The place of a module's weight in a model file.

    Attributes:
        name: the tensor in the file.
        shape: of the weight in the model.
        rows: of the tensor, if it is several weights stacked; None for all.
        transposed: whether the tensor is the weight's transpose.
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None
    transposed: bool = False

    @property
    def bias(self) -> str:
        """Return the tensor in the file with the module's bias, in the same rows."""
        return f"{self.name.removesuffix('weight')}bias"


@dataclass(frozen=True)
class AdapterNaming:
    """One model of a family, and the names of its adapters in files.

    Attributes:
        title: for messages: "U-Net", "CLIP-L".
        kohya, diffusers, comfyui: prefixes of its modules' names; the first is written, all are read.
        locate: given the shapes in a file, returns the place of every module's weight by its path in ``published``;
            empty if the file does not hold this model.
        usual: paths, in ``published``, of the modules that adapters change by default.
        convs: paths of the modules that adapters of convolutions change too.
        published: the kind of paths in published (kohya) names.
    """

    title: str
    paths: ModulePaths
    kohya: tuple[str, ...]
    diffusers: str
    comfyui: tuple[str, ...]
    locate: Callable[[Shapes], Mapping[str, WeightPlace]]
    usual: re.Pattern[str]
    convs: re.Pattern[str] | None = None
    published: Space = "original"

    def space(self, naming: Naming) -> Space:
        if naming == "kohya":
            return self.published
        return "original" if naming == "comfyui" else "diffusers"

    def prefixes(self, naming: Naming) -> tuple[str, ...]:
        """Return how the names of its modules begin; PEFT's are read under diffusers' names."""
        if naming == "kohya":
            return self.kohya
        return tuple(f"{name}." for name in (self.comfyui if naming == "comfyui" else (self.diffusers,)))

    def name(self, naming: Naming, path: str) -> str:
        """Return a module's name in a file, from its path in ``space(naming)``."""
        if naming == "kohya":
            return self.kohya[0] + path.replace(".", "_")
        return (PEFT_ROOT if naming == "peft" else self.prefixes(naming)[0]) + path

    @property
    def prefix(self) -> str:
        """Return the published prefix without its last underscore."""
        return self.kohya[0].removesuffix("_")

    def places(self, shapes: Shapes) -> dict[str, WeightPlace]:
        """Return the weights of a model file by the published names of their adapters; empty for other files."""
        return {self.name("kohya", path): place for path, place in self.locate(shapes).items()}

    def usual_places(self, shapes: Shapes, *, convs: bool) -> dict[str, WeightPlace]:
        """Return the places of the modules that adapters usually change; with ``convs``, of convolutions too."""
        patterns = [self.usual, *([self.convs] if convs and self.convs is not None else [])]
        return {
            self.name("kohya", path): place
            for path, place in self.locate(shapes).items()
            if len(place.shape) in (2, 4) and any(pattern.search(path) for pattern in patterns)
        }


def places_below(shapes: Shapes, sign: str, *, level: str = "") -> dict[str, WeightPlace]:
    """Return every weight of a model whose file has the model's own names, by the module's path.

    Args:
        sign: text in the name of some tensor, directly after the prefix of all names in the file.
        level: how paths begin, where the names in the file leave that out.
    """
    prefix = next((name[: name.index(sign)] for name in shapes if sign in name), None)
    if prefix is None:
        return {}
    return {
        f"{level}{name[len(prefix) :].removesuffix('.weight')}": WeightPlace(name, shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight")
    }


# ---- a family ----


@dataclass(frozen=True)
class Evidence:
    """Names, shapes and metadata of an adapter file that identify its model.

    Attributes:
        text: all names, one per line, with underscores for dots.
        recorded: what the metadata says of the model, in lower case.
        attention_widths: inputs of cross-attention layers.
        text_widths: inputs of a text encoder's attention layers.
        block_widths: inputs of layers in the blocks of a transformer.
    """

    text: str
    recorded: str
    metadata: Mapping[str, str]
    attention_widths: frozenset[int]
    text_widths: frozenset[int]
    block_widths: frozenset[int] = frozenset()

    def blocks(self, name: str) -> int:
        """Return the length that a list of blocks has at least."""
        return 1 + max((int(number) for number in re.findall(rf"(?:^|_){name}_(\d+)_", self.text, re.M)), default=-1)


@dataclass(frozen=True)
class ModelRecord:
    """Metadata of a model: the first two are ``ss_base_model_version`` and ``ss_v2``, the others modelspec's."""

    base_version: str
    v2: bool
    architecture: str
    implementation: str
    resolution: str
    prediction_type: str | None = None

    def modelspec(self) -> dict[str, str]:
        """Return the answer of ``Architecture.modelspec``, without a prediction type where there is none."""
        found = {
            "architecture": self.architecture,
            "implementation": self.implementation,
            "default_resolution": self.resolution,
        }
        return found if self.prediction_type is None else {**found, "prediction_type": self.prediction_type}


@dataclass(frozen=True)
class AdapterFamily:
    """A kind of model, and the names of its adapters in files.

    Attributes:
        key: the value of the tools' ``--family``.
        parts: its models, the denoiser first.
        claims: whether an adapter file is for this family; asked in the order of the registry.
        records: possible metadata; the first if nothing is known.
        network_module: our module that reads its LoRAs.
        old_names: beginnings of names in old files, and the advice for such files.
        other_endings: endings of modules' names in other programs' files -> those of the published names.
        unwritten: namings that the program of that naming would not read, and the advice instead.
        opens: opens a model file or folder by its published names, if the family needs its own reader; returns None
            for other models.
        model_record: the record of a model file, if its tensors show it.
        fits: whether a model file with the names of the parts is of this family.
    """

    key: str
    title: str
    parts: tuple[AdapterNaming, ...]
    claims: Callable[[Evidence], bool]
    records: tuple[ModelRecord, ...]
    network_module: str
    old_names: Mapping[str, str] = field(default_factory=dict)
    other_endings: Mapping[str, str] = field(default_factory=dict)
    unwritten: Mapping[Naming, str] = field(default_factory=dict)
    opens: Callable[[Path], Any] | None = None
    model_record: Callable[[Shapes], ModelRecord] | None = None
    fits: Callable[[Shapes], bool] = lambda shapes: True

    def record_of_model(self, shapes: Shapes) -> ModelRecord:
        """Return the record of a model file; the first if its tensors do not show it."""
        return self.records[0] if self.model_record is None else self.model_record(shapes)

    def record_of(self, metadata: Mapping[str, str]) -> ModelRecord:
        """Return the record that fits the metadata of a source best."""
        version = metadata.get("ss_base_model_version", "")
        architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
        for fits in (
            lambda r: r.base_version == version and r.architecture == architecture,
            lambda r: r.architecture == architecture,
            lambda r: r.base_version == version,
        ):
            if (found := next(filter(fits, self.records), None)) is not None:
                return found
        return self.records[0]
