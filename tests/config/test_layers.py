"""The configuration knows how options are declared and checked, and none of their owners."""

from __future__ import annotations

import ast
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[2] / "library" / "config"
#: it reads all owners to write their pages, and nothing imports it
GENERATOR = "document.py"
#: ``library.diffusion`` is none of them: it is a layer below, whose names of samplers prompts are read with
OWNERS = (
    "library.architectures",
    "library.training",
    "library.inference",
    "library.optim",
    "networks",
)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_config_imports_no_owner_of_options() -> None:
    files = [path for path in CONFIG.rglob("*.py") if path.name != GENERATOR]
    assert len(files) > 20
    wrong = {
        f"{path.relative_to(CONFIG)}: {name}"
        for path in files
        for name in imported(path)
        if any(name == owner or name.startswith(f"{owner}.") for owner in OWNERS)
    }
    assert not wrong


def test_nothing_imports_the_generator() -> None:
    root = CONFIG.parents[1]
    users = [*root.glob("*.py"), *(root / "library").rglob("*.py"), *(root / "tools").rglob("*.py")]
    assert not [str(path) for path in users if "library.config.document" in imported(path)]
