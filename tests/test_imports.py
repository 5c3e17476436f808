"""No file imports from a layer above its own, and none import each other in circles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache

import pytest

from tests.fixtures.runs import ROOT

#: files that import each other; this list may only shrink
CIRCLES: set[frozenset[str]] = set()
#: files outside the order: one reads all owners of options to write their pages, the others serve programs of others
OUTSIDE = {"library.config.document", "library.train_util", "library.flux_train_utils", "library.huggingface_util"}


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Return the modules of the product that each module imports, anywhere in its file."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ("library", "networks")
        for path in (ROOT / folder).rglob("*.py")
    }
    found = {}
    for module, path in paths.items():
        names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
        whole = {name if name in paths else name.rpartition(".")[0] for name in names}
        found[module] = frozenset(whole & paths.keys() - {module})
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def order() -> tuple[str, ...]:
    """The layers of docs/architecture.md, the lowest first."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Layers")[2].partition("\n## ")[0]
    return tuple(name.replace("/", ".") for name in re.findall(r"^\d+\. `([\w/]+)/`", section, re.MULTILINE))


def layer(module: str) -> int:
    """The number of a module's layer."""
    return max((number for number, name in enumerate(order()) if f"{module}.".startswith(f"{name}.")), key=len_of)


def len_of(number: int) -> int:
    return len(order()[number])


def test_the_order_names_every_folder() -> None:
    assert order()[0] == "library" and len(order()) > 8
    folders = {path.name for path in (ROOT / "library").iterdir() if (path / "__init__.py").exists()}
    assert {f"library.{name}" for name in folders} | {"library", "networks"} == set(order())


def test_no_import_points_upward() -> None:
    found = {
        (module, target)
        for module, targets in imports().items()
        for target in targets
        if layer(target) > layer(module) and module not in OUTSIDE
    }
    assert not found, "import from a layer below, or move things down"


def test_no_files_import_each_other() -> None:
    found = set(circles(imports()))
    assert not found - CIRCLES
    assert not CIRCLES - found, "these are gone: strike them from CIRCLES"


def circles(graph: Mapping[str, frozenset[str]]) -> Iterator[frozenset[str]]:
    """Groups of modules each of which reaches all others."""
    reached = {module: reach(graph, module) for module in graph}
    done: set[str] = set()
    for module, others in reached.items():
        group = frozenset(other for other in others if module in reached[other])
        if module in others and module not in done:
            done |= group
            yield group


def reach(graph: Mapping[str, frozenset[str]], start: str) -> set[str]:
    """All modules that ``start`` imports, directly or not; itself only if it is in a circle."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    return seen


@pytest.mark.parametrize(
    ("edges", "groups"),
    [
        ({"a": "b", "b": "c", "c": ""}, []),
        ({"a": "b", "b": "a", "c": "a"}, ["ab"]),
        ({"a": "b", "b": "c", "c": "a", "d": "e", "e": "d"}, ["abc", "de"]),
    ],
)
def test_circles_are_found(edges: Mapping[str, str], groups: list[str]) -> None:
    graph = {module: frozenset(targets) for module, targets in edges.items()}
    assert set(circles(graph)) == {frozenset(group) for group in groups}
