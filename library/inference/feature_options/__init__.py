"""Options of ``gen_img.py`` for one feature of generation each, with their rules; without torch.

A file has a ``DECLARATION`` and is found by being here. The features in ``library/inference/features/`` that its
options are for name it as their ``declaration``.
"""

from __future__ import annotations

import importlib
import pkgutil

from library.config.declaration import Declaration, joined


def declared() -> Declaration:
    """Return what the files of this folder declare."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return joined(*(importlib.import_module(f"{__name__}.{name}").DECLARATION for name in names))
