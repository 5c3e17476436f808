"""The model families: one line for each, and questions to all of them.

Everything else about a family is in its folder: ``about.py`` (names of its files, folders and scripts),
``adapters.py`` (``ADAPTERS``: the names of its adapters in files), ``family.py`` (the family itself), and for families
with a minimal inference script ``inference.py`` (``INFERENCE``).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.architectures.adapters import AdapterFamily
    from library.architectures.base import Architecture
    from library.architectures.minimal_inference import MinimalInference
    from library.architectures.signs import About
    from library.config.declaration import Declaration

#: folders of the families, in the order in which files are compared with them: the most specific names first
FOLDERS = (
    "lumina",
    "sd3",
    "hunyuan_image",
    "flux",
    "sdxl",
    "sd",
)


def about(folder: str) -> About:
    """Return the description of a family's files; nothing heavy is imported."""
    return importlib.import_module(f"{__package__}.{folder}.about").ABOUT


def abouts() -> Iterator[About]:
    """Return the descriptions of all families, in the order of the registry."""
    return map(about, FOLDERS)


def declaration(folder: str) -> Declaration:
    """Return the own options of a family; no model is imported."""
    return importlib.import_module(f"{__package__}.{folder}.options").DECLARATION


def architecture(folder: str) -> Architecture:
    """Return the family of a folder; its models are imported."""
    return getattr(importlib.import_module(f"{__package__}.{folder}"), about(folder).instance)


def architectures() -> Iterator[Architecture]:
    """Yield every family."""
    return map(architecture, FOLDERS)


def default_architecture() -> Architecture:
    """Return the family that tools take where no flag names another, which networks without a family are for."""
    return architecture(next(folder for folder in FOLDERS if not about(folder).tool_flag))


def by_tool_flag() -> dict[str, Architecture]:
    """Return the families by the flag that tools for several families know them by; "" is the one without a flag."""
    return {about(folder).tool_flag: architecture(folder) for folder in FOLDERS}


def tool_flags() -> list[str]:
    """Return these flags, without dashes."""
    return [one.tool_flag for one in abouts() if one.tool_flag]


def adapter_families() -> Iterator[AdapterFamily]:
    """Yield the adapter names of each family; several for a family with several kinds of models."""
    for folder in FOLDERS:
        yield from importlib.import_module(f"{__package__}.{folder}.adapters").ADAPTERS


def minimal_inferences() -> dict[str, MinimalInference]:
    """Return the minimal inference scripts by the folders of their families; no model is imported."""
    names = {folder: f"{__package__}.{folder}.inference" for folder in FOLDERS}
    return {
        folder: importlib.import_module(name).INFERENCE
        for folder, name in names.items()
        if importlib.util.find_spec(name)
    }
