"""Hashes of model files, as the web UIs show them and adapter metadata records them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.files.atomic import write_text
from library.files.safetensors_io import plain_tensors

if TYPE_CHECKING:
    from torch import Tensor

NO_FILE = "NOFILE"
IS_DIRECTORY = "IsADirectory"

#: entries of the metadata of adapters
SSHS_KEYS = ("sshs_model_hash", "sshs_legacy_hash")

_SHORT_START, _SHORT_LENGTH = 0x100000, 0x10000
_CHUNK = 1 << 22  # bytes


def model_hash(path: Path | str) -> str:
    """Return the old short hash: sha256[:8] of 64 KiB at offset 1 MiB; ``NOFILE`` or ``IsADirectory`` without a
    file."""
    try:
        with open(path, "rb") as file:
            file.seek(_SHORT_START)
            return hashlib.sha256(file.read(_SHORT_LENGTH)).hexdigest()[:8]
    except FileNotFoundError:
        return NO_FILE
    except IsADirectoryError:
        return IS_DIRECTORY
    except PermissionError:
        return IS_DIRECTORY if Path(path).is_dir() else NO_FILE  # Windows cannot open folders


def file_identity(path: Path) -> tuple[int, int, int, int]:
    """Return a file's inode, size in bytes, and change times of content and inode in ns; equal values mean an unchanged
    file.

    Size and modification time are not enough: copying with times, or swapping two files, keeps them.
    """
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256_file(path: Path | str) -> str:
    """Return the sha256 of a whole file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return an adapter's metadata with the hashes of these tensors."""
    entries = dict(metadata or {})
    return {**entries, **dict(zip(SSHS_KEYS, sshs_hashes(tensors, entries), strict=True))}


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return ``sshs_model_hash`` and ``sshs_legacy_hash`` of an adapter that will be saved.

    The first is the sha256 of a safetensors file's bytes after its header; the second, sha256[:8] of 64 KiB
    at 1 MiB of such a file. Only ``ss_*`` metadata is part of that file, so descriptions may change.
    """
    import safetensors.torch

    kept = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    data = safetensors.torch.save(plain_tensors(tensors), kept or None)
    header = int.from_bytes(data[:8], "little")
    model = hashlib.sha256(memoryview(data)[8 + header :]).hexdigest()
    legacy = hashlib.sha256(data[_SHORT_START : _SHORT_START + _SHORT_LENGTH]).hexdigest()[:8]
    return model, legacy


class HashInBackground:
    """The sha256 of a file, computed in a thread and remembered between runs.

    The remembered hashes are keyed by path, size and modification time, so a checkpoint is read once, not at each
    start.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path).resolve()
        self._result: str | None = _remembered(self._path)
        self._thread: threading.Thread | None = None
        if self._result is None:
            self._thread = threading.Thread(target=self._make, name="hash", daemon=True)
            self._thread.start()

    def _make(self) -> None:
        try:
            self._result = sha256_file(self._path)
        except OSError:
            self._result = NO_FILE
            return
        _remember(self._path, self._result)

    def result(self) -> str:
        """Wait for the hash and return it."""
        if self._thread is not None:
            self._thread.join()
        return self._result or NO_FILE


def memory_file() -> Path:
    """Return the file in which hashes are remembered; ``SUITE_CACHE_DIR`` names another folder."""
    if folder := os.environ.get("SUITE_CACHE_DIR"):
        return Path(folder) / "hashes.json"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))
    else:
        base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(base) / "image-diffusion-training" / "hashes.json"


def _name_of(path: Path) -> str:
    found = path.stat()
    return f"{path}|{found.st_size}|{found.st_mtime_ns}"


def _read_memory() -> dict[str, str]:
    try:
        content = json.loads(memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remembered(path: Path) -> str | None:
    try:
        return _read_memory().get(_name_of(path))
    except OSError:
        return None


def _remember(path: Path, value: str) -> None:
    # a folder that cannot be written only means that the file is hashed again next time
    with contextlib.suppress(Exception):
        memory = {**_read_memory(), _name_of(path): value}
        memory_file().parent.mkdir(parents=True, exist_ok=True)
        write_text(memory_file(), json.dumps(memory, indent=1))
