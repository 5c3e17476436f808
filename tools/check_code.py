"""Checks the code: lint, format, types; and reports sizes of files and functions.

python tools/check_code.py [--sizes]

It ends with code 1 where ruff or mypy finds something. Sizes are a report: half of the files should have 200 lines or
fewer, no file more than 500, no function more than 80. Packages are installed as run_tests.py does.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.environment import set_up

PRODUCT = ("library", "networks", "tools", "finetune")
MEDIAN_LINES, FILE_LINES, FUNCTION_LINES = 200, 500, 80


def product_files() -> list[Path]:
    """Return the files that users run: packages and entry scripts, without tests."""
    inside = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *inside])


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of each function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield node.name, node.end_lineno - node.lineno + 1


def report_sizes() -> list[str]:
    """Return lines on the sizes of files and functions, the ones beyond the aims first."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in product_files()}
    large = sorted(((size, path) for path, size in lines.items() if size > FILE_LINES), reverse=True)
    longs = sorted(
        ((size, path, name) for path in lines for name, size in functions(path) if size > FUNCTION_LINES), reverse=True
    )
    return [
        f"{len(lines)} files, median {statistics.median(lines.values()):.0f} lines (aim: {MEDIAN_LINES} at most)",
        *(f"  {path.relative_to(ROOT)}: {size} lines (aim: {FILE_LINES} at most)" for size, path in large),
        *(f"  {path.relative_to(ROOT)}, {name}: {n} lines (aim: {FUNCTION_LINES} at most)" for n, path, name in longs),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="report the sizes alone, without installing anything")
    sizes_alone = parser.parse_args().sizes
    print("\n".join(report_sizes()), flush=True)
    if sizes_alone:
        return 0
    python = set_up("requirements-dev.txt")
    checks = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
    codes = [subprocess.run([str(python), "-m", *words], cwd=ROOT, check=False).returncode for words in checks]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
