"""Damage that a cache file can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def rewrite(path: Path, **changes: np.ndarray | None) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def not_a_zip(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign_stamp(path: Path) -> None:
    rewrite(path, stamp=np.array('{"version": 99}'))
