"""Check files and folders that options name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from library.config.declaration import Finding, error
from library.config.mistakes import home_hint


def no_file(name: str, path: str | Path | None) -> Iterator[Finding]:
    """Return an error if the option names something other than a file."""
    if path and not Path(path).is_file():
        what = "a folder, not a file" if Path(path).is_dir() else f"no such file{home_hint(path)}"
        yield error(f"--{name} {path}: {what}")


def no_folder(name: str, path: str | Path | None) -> Iterator[Finding]:
    """Return an error if the option names something other than a folder."""
    if path and not Path(path).is_dir():
        what = "a file, not a folder" if Path(path).is_file() else f"no such folder{home_hint(path)}"
        yield error(f"--{name} {path}: {what}")
