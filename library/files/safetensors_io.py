"""Read and write tensor files: safetensors headers without torch, tensors one at a time, safe pickles."""

from __future__ import annotations

import json
import math
import mmap
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files.atomic import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: a header longer than this is not one (the format's own limit is 100 MB)
_MAX_HEADER = 100_000_000

#: extensions of files that ``torch.save`` writes
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

#: objects of PyTorch Lightning in early published checkpoints, none of which is needed
_IGNORED_GLOBALS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{kind}{bits}DType" for kind in ("Float", "Int") for bits in (32, 64)),
)


#: the format's names of dtypes -> torch's
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
#: bytes of an element
_WIDTHS = {name: 1 if name == "BOOL" else int(name.lstrip("BFIU").partition("_")[0]) // 8 for name in _DTYPES}
_NAMES = {ours: name for name, ours in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # as the format spells it: "F32", "BF16", "I64", ...
    shape: tuple[int, ...]
    offset: int = field(default=0, compare=False)  # of the first byte in the file


@dataclass(frozen=True)
class Header:
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def read_header(path: Path | str) -> Header:
    """Return names, shapes and metadata of a safetensors file, without reading tensors.

    Raises:
        UserError: no such file, not a safetensors file (the message says what it seems to be), or cut short.
    """
    path = Path(path)
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise UserError(f"{path}: not a safetensors file{_seems(path)}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a safetensors file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a safetensors file{_seems(path)}") from None
    try:
        metadata = header.pop("__metadata__", {})
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        fits = all(_fits(tensors[name], *entry["data_offsets"]) for name, entry in header.items())
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        fits = False
    if not fits:
        raise UserError(f"{path}: not a safetensors file: its header is damaged; copy or download it again")
    if size < needed:
        raise UserError(f"{path}: the file is cut short: {size} of {needed} bytes; copy or download it again")
    _refuse_overlaps(path, spans)
    return Header(metadata, tensors)


def _refuse_overlaps(path: Path, spans: Sequence[tuple[int, int, str]]) -> None:
    """Refuse a damaged header: tensors that share bytes, or gaps between tensors.

    Args:
        spans: (begin, end, name) of every tensor, sorted.
    """
    end, before = 0, "the header"
    for begin, stop, name in spans:
        if begin != end:
            what = "overlap" if begin < end else f"have {begin - end} bytes between them"
            raise UserError(f"{path}: damaged: {before} and {name} {what}; copy or download it again")
        end, before = stop, name


def regular_size(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        OSError: there is none.
        UserError: a pipe, socket or device, which could block or never end.
    """
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise UserError(f"{path}: a pipe, socket or device, not a file; give a file")
    return found.st_size


def _fits(info: TensorInfo, begin: int, end: int) -> bool:
    """Whether a tensor has as many bytes as its dtype and shape need."""
    width = _WIDTHS.get(info.dtype)
    return 0 <= begin <= end if width is None else begin >= 0 and end - begin == math.prod(info.shape) * width


def is_pickle(path: Path | str) -> bool:
    """Whether ``torch.save`` wrote a weights file: by its first bytes, because files are renamed, else by its name.

    Raises:
        UserError: a pipe, socket or device.
    """
    path = Path(path)
    try:
        regular_size(path)
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        start = b""
    if _begins_safetensors(start):
        return False
    return _begins_pickle(start) or path.suffix.lower() in PICKLE_SUFFIXES


def _begins_safetensors(start: bytes) -> bool:
    """Whether the file begins with a length below 4 GB and an opening brace."""
    return start[4:9] == b"\0\0\0\0{"


def _begins_pickle(start: bytes) -> bool:
    """Whether the file begins as a zip archive, or as a plain pickle of torch before 1.6."""
    return start.startswith((b"PK\3\4", b"\x80"))


def _seems(path: Path) -> str:
    """Describe what a file that is not a safetensors file, or not a pickle, seems to be."""
    with path.open("rb") as file:
        start = file.read(200)
    if not start:
        return ": it is empty"
    if _begins_safetensors(start):
        return ": it is cut short or damaged; copy or download it again"
    if start.lstrip()[:1] == b"<":
        return ": it seems to be a web page; the download went wrong"
    if start.startswith(b"version https://git-lfs"):
        return ": it is a git-lfs pointer; fetch the real file with git lfs pull"
    if _begins_pickle(start):
        return ": it seems to be a pickled checkpoint; name it .ckpt"
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")):
        return ": it is an image"
    return ""


def iterate_tensors(
    path: Path | str, names: Iterable[str] | None = None, *, mapped: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors one at a time, as views of the mapped file, in the file's order or that of ``names``.

    The pages belong to the system's file cache until they are written to, which the file never sees. safetensors'
    own reader copies every tensor, which for a U-Net costs a second and as much memory again.

    Args:
        mapped: if False, every tensor is read into its own memory, which is faster on some file systems.

    Raises:
        UserError: as ``read_header``; a tensor of a dtype that torch lacks.
        KeyError: no tensor of that name.
    """
    with TensorReader(path, mapped=mapped) as reader:
        for name in reader.tensors if names is None else names:
            yield name, reader.read(name)


class TensorReader:
    """Reads tensors of a safetensors file in any order, one at a time; a context that keeps the file open.

    Args:
        mapped: as for ``iterate_tensors``.

    Raises:
        UserError: as ``read_header``.
    """

    def __init__(self, path: Path | str, *, mapped: bool = True) -> None:
        self.path = Path(path)
        self.tensors = read_header(path).tensors
        self._file = self.path.open("rb")
        # never closed: views may outlive the reader, and the last view ends the mapping
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None

    def read(self, name: str) -> Tensor:
        """Return one tensor. Raises KeyError for an unknown name, UserError for a dtype that torch lacks."""
        info, title = self.tensors[name], f"{self.path}: {name}"
        return _read(self._file, info, title) if self._map is None else _view(self._map, info, title)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._map = None


def _read(file: BufferedReader, info: TensorInfo, title: str) -> Tensor:
    data = bytearray(math.prod(info.shape) * torch_dtype(info, title).itemsize)
    file.seek(info.offset)
    file.readinto(data)
    return _view(data, replace(info, offset=0), title)


def torch_dtype(info: TensorInfo, title: str) -> torch.dtype:
    """Return the dtype of a tensor in a file; ``title`` names both in the error.

    Raises:
        UserError: torch has no such dtype.
    """
    dtype = known_dtype(info)
    if dtype is None:
        raise UserError(f"{title}: tensors of type {info.dtype} are not supported")
    return dtype


def known_dtype(info: TensorInfo) -> torch.dtype | None:
    """Return the dtype of a tensor in a file, or None if torch does not have it."""
    import torch

    return getattr(torch, _DTYPES.get(info.dtype, ""), None)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a dtype, such as ``"BF16"``."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def _view(mapped: mmap.mmap | bytearray, info: TensorInfo, title: str) -> Tensor:
    import torch

    dtype = torch_dtype(info, title)
    count = math.prod(info.shape)
    if count == 0:
        return torch.empty(info.shape, dtype=dtype)
    tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.offset).view(info.shape)
    # old writers do not pad headers, and vector instructions need aligned elements
    return tensor if info.offset % tensor.element_size() == 0 else tensor.clone()


def load_tensors(
    path: Path | str,
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Load tensors by name; ``dtype`` casts floating-point tensors only.

    Raises:
        UserError: as ``read_header``.
    """
    loaded = {}
    for name, tensor in iterate_tensors(path, names):
        cast = dtype if dtype is not None and tensor.is_floating_point() else None
        loaded[name] = tensor.to(device=device, dtype=cast)
    return loaded


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; views and shared storage are written as plain tensors."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(plain_tensors(tensors), str(temporary), metadata=dict(metadata) if metadata else None)


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the host, contiguous and without shared memory, as safetensors needs them."""
    plain = {}
    storages = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if tensor.numel() and storage in storages:
            tensor = tensor.clone()
        storages.add(storage)
        plain[name] = tensor
    return plain


def load_pickle(path: Path | str) -> dict[str, Tensor]:
    """Load the tensors of a ``.ckpt``, ``.pt`` or ``.bin`` file; nothing in it is executed.

    Raises:
        UserError: no such file, a damaged one, or one with objects other than tensors, plain values and Lightning's
            leftovers, which are skipped.
    """
    import torch
    from torch.serialization import safe_globals

    path = Path(path)
    if path.exists():
        regular_size(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    if not _begins_pickle(start):
        raise UserError(f"{path}: not a pickled checkpoint{_seems(path)}")
    # files of torch before 1.6 are no zip archives and cannot be mapped; torch recognizes .safetensors by its name
    mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
    try:
        with path.open("rb") as file, safe_globals([(_Ignored, name) for name in _IGNORED_GLOBALS]):
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path}: holds objects other than tensors{named}, which could run code, and is not opened; "
            "use a .safetensors file of the model"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError):
        raise UserError(f"{path}: cut short or damaged; copy or download it again") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not named tensors")
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


class _Ignored:
    """Replaces objects of ``_IGNORED_GLOBALS`` in a pickled file; accepts any arguments and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def save_pickle(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with ``torch.save``, atomically."""
    import torch

    with atomic_path(path) as temporary:
        torch.save(dict(tensors), temporary)
