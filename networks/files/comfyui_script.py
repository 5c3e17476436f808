"""The common part of the scripts that give a LoRA the names that ComfyUI reads, and the published ones back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.tool_parser import tool_parser

if TYPE_CHECKING:
    from torch import Tensor


def renaming_parser(doc: str | None) -> argparse.ArgumentParser:
    parser = tool_parser(doc)
    parser.add_argument("src_path", type=str, default=None, help="LoRA to convert")
    parser.add_argument("dst_path", type=str, default=None, help=".safetensors file to write")
    parser.add_argument("--reverse", action="store_true", help="convert from ComfyUI's names to the published ones")
    return parser


@dataclass(frozen=True)
class Renaming:
    """A LoRA to rename, and where to write it."""

    source: Path
    target: Path
    reverse: bool
    weights: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @staticmethod
    def of(args: argparse.Namespace) -> Renaming:
        """Read the LoRA.

        Raises:
            UserError: it cannot be read, or the target cannot be written.
        """
        # only now, as torch takes seconds to load
        from library.files.safetensors_io import is_pickle, read_header
        from library.files.streamed import check_target
        from networks.weights import read_weights

        source, target = Path(args.src_path), Path(args.dst_path)
        weights = read_weights(source)
        check_target(target, "dst_path", sources=[source])
        metadata = {} if is_pickle(source) else dict(read_header(source).metadata)
        return Renaming(source, target, args.reverse, weights, metadata)

    @property
    def version(self) -> str:
        """Return the model's version in the metadata, or an empty text."""
        return self.metadata.get("ss_base_model_version", "")

    @property
    def first(self) -> str:
        """Return the name of the first tensor, for messages."""
        return next(iter(self.weights), "none")

    def done_already(self) -> int:
        """Say that the file has these names, and return the exit code."""
        names = "the published names" if self.reverse else "ComfyUI's names"
        print(f"{self.source}: already has {names}; nothing to do", file=sys.stderr)
        return 1

    def write(self, state: Mapping[str, Tensor], changed: int) -> int:
        """Write the renamed tensors, of which ``changed`` have another name, and return the exit code."""
        from networks.weights import write_weights

        write_weights(self.target, state, None, self.metadata or None)
        print(f"renamed {changed} of {len(state)} tensors\nwritten: {self.target}")
        return 0
