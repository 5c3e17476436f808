"""Find a transformer in its files: in the published layout, whose names are the model's own, or in diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.architectures.common.checkpoint import check_pipeline
from library.architectures.common.joined_layout import JoinedFile, Plan, open_theirs
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.recognise import refuse_other, refuse_scaled, unknown
from library.architectures.common.scaled_file import with_plain_numbers
from library.architectures.common.sharded_file import ShardedFile, open_weights
from library.architectures.common.sources import in_file
from library.architectures.common.tensor_files import Shapes, WeightFile


@dataclass(frozen=True)
class TransformerLayouts:
    """The two layouts of the files of a family's transformer.

    Attributes:
        family: its key, such as "sd3".
        title: of a file in messages: "Lumina-Image 2.0 transformer".
        modules: the model's outermost modules.
        sign: a tensor of every transformer in the published layout.
        theirs: the beginning of a name that only diffusers' layout has.
        plan: shapes in diffusers' layout -> every published tensor as rows of diffusers' tensors.
    """

    family: str
    title: str
    modules: tuple[str, ...]
    sign: str
    theirs: str
    plan: Callable[[Shapes], Plan]

    def published(self, prefix: str = "") -> TensorLayout:
        """Return the published layout with a prefix before all names."""
        return TensorLayout(KeyMap((name, name) for name in self.modules), prefix)

    def prefix(self, names: Iterable[str]) -> str:
        """Return the prefix of all names of the transformer in a file of the published layout."""
        return next((name.removesuffix(self.sign) for name in names if name.endswith(self.sign)), "")

    def open_theirs(self, path: Path) -> JoinedFile | None:
        """Return a file or folder in diffusers' layout with published names; None for anything else."""
        return open_theirs(path, self._is_theirs, self._published_view)

    def source(
        self,
        path: Path,
        infer_sizes: Callable[[Shapes], Any],
        check: Callable[[Path, Shapes], None] = lambda path, shapes: None,
    ) -> ModelSource:
        """Return the transformer of a file, of several shards, or of a folder: its own, or that of a pipeline.

        Args:
            infer_sizes: published shapes, without prefix -> the configuration's ``sizes``.
            check: called with the shapes as they are in the file; refuses variants that are not supported.

        Raises:
            UserError: something else, incomplete, or quantised.
        """
        if path.is_dir():
            check_pipeline(path, self.family)
        inner = path / "transformer"
        place = inner if inner.is_dir() else path
        file = with_plain_numbers(open_weights(place))
        refuse_other(path, file.shapes.keys(), self.family)
        check(path, file.shapes)
        if self._is_theirs(file.shapes):
            return self._described(self._published_view(ShardedFile.open(place)), "", infer_sizes)
        prefix = self.prefix(file.shapes)
        if prefix + self.sign not in file.shapes:
            raise unknown(path, file.shapes.keys(), self.title)
        return self._described(file, prefix, infer_sizes)

    def _is_theirs(self, names: Iterable[str]) -> bool:
        return any(name.startswith(self.theirs) for name in names)

    def _published_view(self, file: ShardedFile) -> JoinedFile:
        return JoinedFile.of(file, self.plan)

    def _described(self, file: WeightFile, prefix: str, infer_sizes: Callable[[Shapes], Any]) -> ModelSource:
        shapes = {name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)}

        def described(_: WeightFile) -> ModelSource:
            refuse_scaled(shapes)
            return ModelSource("transformer", file, self.published(prefix), {"sizes": infer_sizes(shapes)})

        return in_file(file.path, described, file)
