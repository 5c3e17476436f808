"""Import costly packages only when something of them is used."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from library.errors import exits_on_user_error


class _Deferred(ModuleType):
    """A module that is executed when an attribute other than ``__spec__`` and the like is read.

    ``importlib.util.LazyLoader`` does not work here: its modules are executed by ``find_spec``.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        # from here on the module's own code and everyone else sees a plain module
        self.__class__ = ModuleType  # type: ignore[assignment]
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


class _Hiding(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets one module be executed as if some packages were not installed."""

    def __init__(self, module: str, packages: tuple[str, ...]) -> None:
        self._module = module
        self._packages = packages
        self._loader: Any = None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self._module or self._loader is not None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        hidden = [name for name in self._packages if name not in sys.modules]
        sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
        try:
            self._loader.exec_module(module)
        finally:
            for name in hidden:
                del sys.modules[name]


def hide_from(module: str, *packages: str) -> None:
    """Let a module that looks for installed packages not find these; everything else does.

    It is for packages that another one imports with everything if they are installed, and that nothing here uses.

    Args:
        module: the full name of a module that is not imported yet; afterwards this has no effect.
    """
    if module not in sys.modules:
        sys.meta_path.insert(0, _Hiding(module, packages))


#: whether objects were frozen here; ``gc.get_freeze_count`` goes through all of them to tell
_has_frozen = False


@contextlib.contextmanager
def without_collection(*, freeze: bool | None = False) -> Iterator[None]:
    """Have no garbage collection within the context, for work that makes many objects which stay, such as imports.

    Otherwise the collector goes through all of them, time and again: for 0.9 of 6.4 s of a dry run.

    Args:
        freeze: everything that is there afterwards is left out of later collections, too. So no models must be there:
            a cycle of references that holds one would never be freed. ``None``: only if something was frozen before,
            as by a script; in a notebook, where another run may follow, nothing is.
    """
    global _has_frozen
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        if freeze or (freeze is None and _has_frozen):
            gc.freeze()
            _has_frozen = True
    finally:
        if collects:
            gc.enable()


def found_in(module: str, *names: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package: the names are those of a module that is imported when one of them is read.

    The options of a model family are read without its models, which take seconds to import.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"no attribute {name!r}; there are {', '.join(names)}")
        return getattr(importlib.import_module(module), name)

    return get


def made_by(module: str, **makers: Callable[[], Any]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a script: each name is made when it is read for the first time.

    The command line of a script is there without torch; the trainer that programs import from it needs torch.

    Args:
        module: name of the script's module.
    """

    def get(name: str) -> Any:
        if name not in makers:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        made = makers[name]()
        made.__module__, made.__qualname__ = module, name
        setattr(sys.modules[module], name, made)
        return made

    return get


@exits_on_user_error
def run_trainer(trainer: Callable[[], type], args: argparse.Namespace) -> None:
    """Import the trainer of a script and train.

    Raises:
        SystemExit: with code 2, after clear lines, also where memory ends while packages are imported.
    """
    with without_collection(freeze=True):
        kind = trainer()
    kind().train(args)
