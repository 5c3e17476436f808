"""Other commits of this project in folders of their own, to measure them in turn with the present one."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def checked_out(commit: str | None) -> Iterator[Path]:
    """Have the files of a commit in a folder, which is removed afterwards; without one it is the present folder."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def in_turn(round_number: int, trees: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Return the trees in the order of a round: every second one is turned round, so that drift favours neither."""
    return trees if round_number % 2 == 0 else trees[::-1]
