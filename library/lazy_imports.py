"""Import costly packages only when something of them is used."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """A module that is executed when an attribute other than ``__spec__`` and the like is read.

    ``importlib.util.LazyLoader`` does not work here: its modules are executed by ``find_spec``.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        # from here on the module's own code and everyone else sees a plain module
        self.__class__ = ModuleType
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        return getattr(self, name)


def defer_import(name: str) -> None:
    """Make ``import name`` cost nothing until something of the module is used.

    It is for packages that others import without need: diffusers imports bitsandbytes with every model, which imports
    torch's compiler. Nothing happens where the package is missing or already imported.

    Args:
        name: of a top-level package.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = _Deferred(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    # no __path__ yet: importing a submodule asks for it, and the package must be executed before
    sys.modules[name] = module
