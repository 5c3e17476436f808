"""Features of generation besides plain sampling: one file each, combined by ``library.inference.denoise``.

A file defines one subclass of ``Feature`` and is found by being here.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.config.prompt_options import PromptOption
    from library.inference.denoise import Feature


def feature(name: str) -> type[Feature]:
    """Return the feature of a file of this folder."""
    from library.inference.denoise import Feature

    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = [
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Feature) and one.__module__ == module.__name__
    ]
    return found


def all_features() -> tuple[type[Feature], ...]:
    """Return all features, in the order in which they are prepared and wrapped."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(map(feature, names), key=lambda one: one.order))


def prompt_options() -> tuple[PromptOption, ...]:
    """Return the prompt options of all features."""
    return tuple(option for one in all_features() for option in one.prompt_options)
