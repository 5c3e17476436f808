"""Import the module that ``--network_module`` names: one of this project, or of another."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

from library.errors import UserError, did_you_mean

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
#: in the source of a network module
_MAKES_NETWORKS = re.compile(r"^(def create_network\(|create_network = )", re.MULTILINE)


def import_network_module(name: str, needed: str = "create_network") -> ModuleType:
    """Import ``networks.lora`` or a third-party module such as ``lycoris.kohya``.

    Args:
        needed: the function of the protocol that will be called.

    Raises:
        UserError: no such module, one that cannot be imported, or one that is no network module.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--network_module {name}: not the name of a module; write it with dots and without .py, as networks.lora"
        )
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name != error.name and not name.startswith(f"{error.name}."):
            raise UserError(f"--network_module {name}: it needs the package {error.name}; pip install it") from None
        raise UserError(
            f"--network_module {name}: no such module{did_you_mean(name, _known())}; LoRA is networks.lora, and a "
            "third-party module must be installed in this environment"
        ) from None
    except Exception as error:  # whatever another project's module raises while it is imported
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--network_module {name}: it cannot be imported: {type(error).__name__}: {what}") from error
    if not hasattr(module, needed):
        raise UserError(f"--network_module {name}: not a network module (it has no {needed})")
    return module


def _known() -> list[str]:
    folder = Path(__file__).parent
    return [f"networks.{p.stem}" for p in folder.glob("*.py") if _MAKES_NETWORKS.search(p.read_text("utf-8"))]
