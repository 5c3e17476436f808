"""Features of generation besides plain sampling: one file each, combined by ``library.inference.denoise``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.inference.denoise import Feature


def feature(name: str) -> type[Feature]:
    """Return the feature of a file of this folder: the one subclass of ``Feature`` that it defines."""
    from library.inference.denoise import Feature

    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = [
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Feature) and one.__module__ == module.__name__
    ]
    return found
