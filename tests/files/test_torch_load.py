"""No file of a user may run code: ``torch.load`` unpickles, unless it reads tensors only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKIPPED = {".git", ".venv", "venv", "node_modules"}


def loads(source: str) -> list[tuple[int, bool]]:
    """Line of each call of ``torch.load`` (under any name), and whether it reads tensors only."""
    tree = ast.parse(source)
    modules, functions = {"torch"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            functions |= {alias.asname or alias.name for alias in node.names if alias.name == "load"}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in functions or called in {f"{module}.load" for module in modules}:
            safe = any(
                word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
                for word in node.keywords
            )
            found.append((node.lineno, safe))
    return found


def test_every_load_reads_tensors_only() -> None:
    files = [path for path in ROOT.rglob("*.py") if not SKIPPED & set(path.relative_to(ROOT).parts)]
    calls = [(path.relative_to(ROOT), *call) for path in files for call in loads(path.read_text(encoding="utf-8"))]
    assert any(path.parts[0] == "library" for path, _, _ in calls)
    unsafe = [f"{path}:{line}" for path, line, safe in calls if not safe]
    assert not unsafe, f"torch.load without weights_only=True: {', '.join(unsafe)}"


def test_the_audit_sees_other_spellings() -> None:
    source = (
        "import torch as t\nfrom torch import load as l\nt.load(x)\nl(x, weights_only=False)\nl(x, weights_only=True)"
    )
    assert loads(source) == [(3, False), (4, False), (5, True)]
