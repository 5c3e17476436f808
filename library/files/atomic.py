"""Files and folders that appear whole or not at all.

Files are written beside their place under a name that begins with "." and ends with ".tmp", flushed to the disk, and
renamed into place. A process that dies leaves the previous file whole and at most a temporary
one, which the next write of the same target removes. A folder ends with a manifest of its files' sizes and
hashes, written last. One folder cannot replace another in a single step. If the process is killed between the two
renames, the new folder is complete under its temporary name, and ``recover_directory`` puts it in place.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from library.errors import UserError

MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 20  # bytes read at a time
#: bytes of a file's name, on nearly all file systems
MAX_NAME = 255
_LONGEST_ENDING = len("..0123456789ab.tmp")
_DAY = 86400  # seconds
_UMASK = os.umask(0o077)  # the umask can only be read by setting it
os.umask(_UMASK)
_NEW_FILE = 0o666 & ~_UMASK  # permissions of a new file
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def atomic_path(path: Path | str, *, by_many: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, on an error it is removed.

    Args:
        by_many: several processes may write the file at once, each under its own temporary name. The last one wins.
            Temporary files that a killed process left are removed once they are a day old.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    if by_many:
        with _clear_errors(path):
            _clear_old(path)
        temporary = path.with_name(f".{_short(path.name)}.{uuid.uuid4().hex[:12]}.tmp")
    clear(temporary)
    try:
        with _clear_errors(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush_folder(path.parent)
    finally:
        clear(temporary)


def write_bytes(path: Path | str, data: bytes, *, by_many: bool = False) -> None:
    """Write a file atomically; for ``by_many`` see ``atomic_path``."""
    with atomic_path(path, by_many=by_many) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str, *, by_many: bool = False) -> None:
    """Write a UTF-8 file atomically; for ``by_many`` see ``atomic_path``."""
    write_bytes(path, text.encode("utf-8"), by_many=by_many)


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it becomes ``path`` with a manifest.

    An existing folder is moved aside first and removed when the new one is in its place.

    Raises:
        UserError: the disk is full, or the parent folder cannot be written.
    """
    path = Path(path)
    temporary, aside = _temporary(path), _aside(path)
    recover_directory(path)
    clear(temporary)
    try:
        with _clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            _write_manifest(temporary)
            clear(aside)
            if path.exists():
                os.replace(path, aside)
            try:
                os.replace(temporary, path)
            except OSError:
                if aside.exists():
                    os.replace(aside, path)
                raise
            _flush_folder(path.parent)
            clear(aside)
    finally:
        clear(temporary)


def recover_directory(path: Path | str) -> None:
    """Finish the replacement of a folder that a killed process began. Call it before reading the folder."""
    path = Path(path)
    if path.exists():
        return
    for whole in (_temporary(path), _aside(path)):
        if (whole / MANIFEST_NAME).exists():
            with contextlib.suppress(UserError, OSError):  # damaged, or put in place by another process
                verify_directory(whole)
                os.replace(whole, path)
                return


def read_manifest(path: Path | str) -> dict[str, dict[str, object]]:
    """Return ``{relative file name: {"size": bytes, "sha256": hex}}`` of a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    manifest = Path(path) / MANIFEST_NAME
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{manifest}: no readable manifest ({error}); the folder is not complete") from None


def verify_directory(path: Path | str) -> None:
    """Compare a folder with its manifest.

    Raises:
        UserError: naming the first file that is missing, cut short or changed.
    """
    path = Path(path)
    for name, entry in read_manifest(path).items():
        file = path / name
        if not file.exists():
            raise UserError(f"{path}: {name} is missing; the folder is damaged, use another")
        size = file.stat().st_size
        if size != entry["size"]:
            raise UserError(f"{path}: {name} has {size} of {entry['size']} bytes; the folder is damaged, use another")
        if _sha256(file) != entry["sha256"]:
            raise UserError(f"{path}: {name} has changed since it was written; the folder is damaged, use another")


def remove_tree(path: Path | str) -> None:
    """Remove a folder so that no reader finds a part of it under its name."""
    path = Path(path)
    # not the name of a folder that waits to be replaced, so that a removed folder never comes back
    aside = path.with_name(f".{_short(path.name)}.removed.tmp")
    clear(aside)
    os.replace(path, aside)
    shutil.rmtree(aside)


# ---- pieces ----


def _short(name: str) -> str:
    """Return a name that is short enough to become a temporary name."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= MAX_NAME - _LONGEST_ENDING else hashlib.sha256(encoded).hexdigest()[:32]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.tmp")


def _aside(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.old.tmp")


def _clear_old(path: Path) -> None:
    for name in _leftovers(path.parent):
        left = path.with_name(name)
        if fnmatch.fnmatchcase(name, f".{glob.escape(_short(path.name))}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _DAY:
                    left.unlink()


@functools.cache
def _leftovers(folder: Path) -> tuple[str, ...]:
    """Return the temporary files that were in a folder when this process first wrote there.

    The folder is listed once, because it may hold a hundred thousand files, which are written one by one.
    """
    with os.scandir(folder) as entries:
        return tuple(e.name for e in entries if e.name.startswith(".") and e.name.endswith(".tmp"))


def make_folder(path: Path) -> None:
    """Create a folder and its parents, if they are missing.

    Raises:
        UserError: the disk is full, or the folder cannot be created there.
    """
    try:
        with _clear_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made: {error.strerror}") from None


def clear(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk into one clear line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_reason(error, path)
        if reason is None:
            raise
        raise UserError(f"{path}: {reason}") from error


def disk_reason(error: Exception, path: Path) -> str | None:
    """Return the reason why writing failed, as Python, safetensors or torch report it; ``None`` for other errors."""
    number = _error_number(error)
    if number in _FULL:
        return f"the disk is full{_free_space(path)}; what was there before is whole"
    if number == errno.EFBIG:
        return "larger than a file may be here; raise the limit (ulimit -f), or write to another file system"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"may not be written ({os.strerror(number)})"
    return f"cannot be written ({os.strerror(number)})" if number is not None else None


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if type(error).__name__ == "SafetensorError":
        number = re.search(r"(?:os error|code:) (\d+)", text)
        return int(number[1]) if number else None
    # torch's writer gives no error number; other causes, such as a lost mount, are rare and obvious
    refused = any(words in text for words in ("PytorchStreamWriter failed", "unexpected pos", "iostream error"))
    if not (isinstance(error, RuntimeError) and refused):
        return None
    return errno.EFBIG if _sizes_are_limited() else errno.ENOSPC


def _sizes_are_limited() -> bool:
    """Whether this process may not write files of any size (``ulimit -f``)."""
    if os.name != "posix":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


def _free_space(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB free)"
    except OSError:
        return ""


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        _flush(file)
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _flush(manifest)
    _flush_folder(folder)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(file: Path) -> None:
    """Flush a file to the disk and give it the permissions of a new file; safetensors makes files that only their owner
    can read."""
    # opened for writing, because Windows flushes only such handles
    with file.open("rb+") as stream:
        mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        if os.name == "posix" and mode | _NEW_FILE != mode:
            with contextlib.suppress(OSError):  # some network drives have no permissions
                os.fchmod(stream.fileno(), mode | _NEW_FILE)
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # Windows cannot flush a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
