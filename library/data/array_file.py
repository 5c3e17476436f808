"""Read npz files, the format of caches, several times faster than numpy.

An npz file is a zip archive of npy files, one for each array. ``numpy.savez`` stores them uncompressed, so an array is
one read at a known position; numpy's reader goes through ``zipfile``'s streams and evaluates each header as Python.
Anything stored otherwise is left to these two.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

#: before an array of version 1.0 of the format: its magic string and version, and the length of the header in 2 bytes
_START = npy.magic(1, 0)
_HEADER_AT = len(_START) + 2

#: of a member in the archive: its mark; at 26 and 28 the lengths of the name and of what is between it and the content
_LOCAL = struct.Struct("<4s22xHH")
_LOCAL_MARK = b"PK\x03\x04"
_ENCRYPTED = 0x1


class ArrayFile:
    """The arrays of an open file, each read and checked by its checksum (CRC-32) on access."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._archive = zipfile.ZipFile(file)
        self._members = {
            info.filename.removesuffix(".npy"): info
            for info in self._archive.infolist()
            if info.filename.endswith(".npy")
        }

    @property
    def files(self) -> list[str]:
        """Return the names of the arrays."""
        return list(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return one array, in its own memory.

        Raises:
            KeyError: there is no such array.
            Exception: of many kinds, where the file is damaged.
        """
        content = self._content(self._members[name])
        if content[: len(_START)] != _START:
            return npy.read_array(io.BytesIO(content), allow_pickle=False)
        start = _HEADER_AT + int.from_bytes(content[len(_START) : _HEADER_AT], "little")
        shape, fortran_order, dtype = _header(bytes(content[:start]))
        if len(content) - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {len(content) - start} bytes instead of {prod(shape) * dtype.itemsize}")
        values = np.frombuffer(content, dtype=dtype, offset=start)
        return values.reshape(shape[::-1]).T if fortran_order else values.reshape(shape)

    def _content(self, member: zipfile.ZipInfo) -> bytearray:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            return bytearray(self._archive.read(member))
        self._file.seek(member.header_offset)
        mark, name_length, extra_length = _LOCAL.unpack(self._file.read(_LOCAL.size))
        if mark != _LOCAL_MARK or member.file_size > os.fstat(self._file.fileno()).st_size:
            raise zipfile.BadZipFile(f"{member.filename} is not where it should be")
        self._file.seek(name_length + extra_length, io.SEEK_CUR)
        content = bytearray(member.file_size)  # writable, as torch needs it
        if self._file.readinto(content) != len(content) or zlib.crc32(content) != member.CRC:  # type: ignore[attr-defined]
            raise zipfile.BadZipFile(f"bad CRC-32 of {member.filename}")
        return content


@lru_cache(maxsize=256)
def _header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and dtype from the start of an npy file; they are mostly the same in a run's files.

    Raises:
        ValueError: it is no npy file, or holds Python objects.
    """
    file = io.BytesIO(content)
    npy.read_magic(file)
    shape, fortran_order, dtype = npy.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects instead of numbers")
    return shape, fortran_order, dtype


@contextmanager
def open_arrays(path: Path) -> Iterator[ArrayFile]:
    """Open an npz file; its arrays are read and checked on access.

    Raises:
        FileNotFoundError: as it says.
        ValueError: the file is damaged; the message says how.
    """
    try:
        with open(path, "rb") as file:
            yield ArrayFile(file)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds of errors on damaged files
        raise ValueError(f"{path}: damaged ({error})") from None
