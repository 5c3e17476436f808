"""Latent cache files: the published npz layout, with a stamp of what the latents were made from.

A file is beside its image, named ``<stem>_<W>x<H><suffix>``, where W x H is the image's own size. Files of the
predecessor have no stamp; they are used when their arrays fit. Arrays outside the layout are kept when a file is made
again, because other programs may have written them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from library.architectures.formats import LatentFormat
from library.data.array_file import open_arrays
from library.errors import UserError
from library.files.atomic import MAX_NAME, atomic_path
from library.files.hashes import file_identity

logger = logging.getLogger(__name__)

STAMP = "stamp"
_STAMP_VERSION = 1

_ARRAYS = ("latents", "original_size", "crop_ltrb", "latents_flipped", "alpha_mask")
#: name that ``np.savez`` gives to an unnamed array: latents of the first cache files, without any description
_UNNAMED = "arr_0"


@dataclass(frozen=True)
class CachedLatents:
    """The cached data of one image."""

    latents: np.ndarray  # float32 (C, h, w), as the family stores them
    latents_flipped: np.ndarray | None  # of the mirrored image
    original_size: tuple[int, int]  # (W, H)
    crop_ltrb: tuple[int, int, int, int]  # in the resized image
    alpha_mask: np.ndarray | None = None  # float32 (H, W) 0..1, opacity of the bucket's pixels, not mirrored


@dataclass(frozen=True)
class Stamp:
    """Everything that latents depend on, besides the code."""

    image: str  # hash of the file's bytes
    image_file: tuple[int, int, int, int]  # its inode, size in bytes, times of change of content and of inode, ns
    vae: str  # identity of the VAE
    bucket: tuple[int, int]  # (W, H)
    interpolation: str | None
    version: int = _STAMP_VERSION

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Stamp:
        """Parse a stamp; one of another version or form is never current."""
        try:
            values = json.loads(text)
            tuples = {name: tuple(values[name]) for name in ("bucket", "image_file")}
            return Stamp(**{**values, **tuples})
        except (ValueError, TypeError, KeyError):
            return Stamp("", (0, 0, 0, 0), "", (0, 0), None, version=0)


def make_stamp(image: Path, *, vae: str, bucket: tuple[int, int], interpolation: str | None) -> Stamp:
    """Return the stamp of latents made now; reads the whole image file.

    Call it before the pixels are read, so that an image that changes in between is found outdated.
    """
    return Stamp(image_digest(image), file_identity(image), vae, bucket, interpolation)


def _same_source(one: Stamp, other: Stamp) -> bool:
    """Whether latents with these stamps are the same, wherever their images were."""
    return replace(one, image_file=other.image_file) == other


def image_digest(image: Path) -> str:
    """Return the hash of an image file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with image.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_current(stamp: Stamp, image: Path, *, vae: str, bucket: tuple[int, int], interpolation: str | None) -> bool:
    """Whether latents with this stamp equal those that would be made now.

    Size and modification time are not enough (copying with times, or swapping two files, keeps them). Together with
    inode and its change time they are, and the image is not read. All others are compared by their bytes.
    """
    made_from = (stamp.version, stamp.vae, stamp.bucket, stamp.interpolation)
    if made_from != (_STAMP_VERSION, vae, bucket, interpolation):
        return False
    return file_identity(image) == stamp.image_file or image_digest(image) == stamp.image


def cache_path(image: Path, size: tuple[int, int], format: LatentFormat) -> Path:
    """Return the cache file of an image of ``size`` (W, H); an old ``<stem>.npz`` is used if it exists."""
    old = image.with_suffix(".npz")
    if not format.multi_resolution and old.exists():
        return old
    return image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}{format.cache_suffix}")


def check_places(paths: Iterable[Path], flag: str) -> None:
    """Refuse cache files that could not be written, before anything is encoded for them.

    Args:
        flag: asks for files; without it the cache is in memory.

    Raises:
        UserError: one line for each folder that is read-only, and for names that are too long.
    """
    paths = list(paths)
    folders = dict.fromkeys(path.parent for path in paths)
    problems = [
        f"{folder}: may not be written, where files are to be cached beside the images; allow it, or train without "
        f"{flag}"
        for folder in folders
        if not os.access(folder, os.W_OK)
    ]
    long = [path for path in paths if len(os.fsencode(path.name)) > MAX_NAME]
    if long:
        more = f", and {len(long) - 1} more" if len(long) > 1 else ""
        problems.append(
            f"{long[0]}{more}: the name is too long for a file; shorten the image's, or train without {flag}"
        )
    if problems:
        raise UserError("\n".join(problems))


def array_suffix(bucket: tuple[int, int], format: LatentFormat) -> str:
    """Return the suffix of array names: files of several resolutions name each by its latent size, ``_<h>x<w>``."""
    if not format.multi_resolution:
        return ""
    return f"_{bucket[1] // format.stride}x{bucket[0] // format.stride}"


def write_cache(path: Path, cached: CachedLatents, stamp: Stamp, format: LatentFormat) -> None:
    """Write a cache file, atomically, also when several programs write the same one.

    Other content of an existing file is kept: latents of other sizes, arrays of other programs, and, with the same
    source, flipped latents and a mask that this run does not need.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    suffix = array_suffix(stamp.bucket, format)
    arrays: dict[str, Any] = _kept(path, stamp, suffix, format)
    arrays[f"latents{suffix}"] = cached.latents.astype(np.float32)
    arrays[f"original_size{suffix}"] = np.array(cached.original_size, dtype=np.int64)
    arrays[f"crop_ltrb{suffix}"] = np.array(cached.crop_ltrb, dtype=np.int64)
    for name, values in (("latents_flipped", cached.latents_flipped), ("alpha_mask", cached.alpha_mask)):
        if values is not None:
            arrays[f"{name}{suffix}"] = values.astype(np.float32)
    arrays[f"{STAMP}{suffix}"] = np.array(stamp.to_text())
    with atomic_path(path, by_many=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _kept(path: Path, stamp: Stamp, suffix: str, format: LatentFormat) -> dict[str, np.ndarray]:
    """Return the arrays of an existing file that stay when latents with ``stamp`` are written to it."""
    try:
        arrays = _read_arrays(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        if format.multi_resolution:
            logger.warning("%s; all its sizes are dropped", error)
        return {}
    arrays.pop(_UNNAMED, None)
    of_size = {name: arrays.pop(name) for name in [f"{n}{suffix}" for n in (*_ARRAYS, STAMP)] if name in arrays}
    found = of_size.get(f"{STAMP}{suffix}")
    if found is not None and _same_source(Stamp.from_text(str(found)), stamp):
        flipped, mask = of_size.get(f"latents_flipped{suffix}"), of_size.get(f"alpha_mask{suffix}")
        if flipped is not None and _fits(flipped, stamp.bucket, format) and np.isfinite(flipped).all():
            arrays[f"latents_flipped{suffix}"] = flipped
        if mask is not None and _mask_fits(mask, stamp.bucket) and np.isfinite(mask).all():
            arrays[f"alpha_mask{suffix}"] = mask
    return arrays


def read_cache(path: Path, bucket: tuple[int, int], format: LatentFormat) -> tuple[CachedLatents, Stamp | None] | None:
    """Read the latents for ``bucket`` (W, H), or ``None`` without that size; every byte is checked.

    Raises:
        ValueError: the file is damaged; the message says how.
    """
    suffix = array_suffix(bucket, format)
    try:
        arrays = _read_arrays(path, suffix)
    except FileNotFoundError:
        return None
    if f"latents{suffix}" not in arrays:
        return None
    latents = arrays[f"latents{suffix}"]
    flipped = arrays.get(f"latents_flipped{suffix}")
    if not all(_fits(values, bucket, format) for values in (latents, flipped) if values is not None):
        return None
    alpha_mask = arrays.get(f"alpha_mask{suffix}")
    if alpha_mask is not None and not _mask_fits(alpha_mask, bucket):
        alpha_mask = None
    try:
        width, height = (int(n) for n in arrays[f"original_size{suffix}"])
        left, top, right, bottom = (int(n) for n in arrays[f"crop_ltrb{suffix}"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    stamp = Stamp.from_text(str(arrays[f"{STAMP}{suffix}"])) if f"{STAMP}{suffix}" in arrays else None
    return CachedLatents(latents, flipped, (width, height), (left, top, right, bottom), alpha_mask), stamp


def read_sample(
    path: Path, bucket: tuple[int, int], format: LatentFormat, *, flipped: bool, alpha_mask: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read what one use needs from a file that ``read_cache`` accepted; ``None`` if it is gone.

    Args:
        flipped: whether of the mirrored image.
        alpha_mask: whether the mask is needed too.

    Returns:
        Latents, float32 (C, h, w), and mask, float32 (H, W), mirrored if ``flipped``.

    Raises:
        ValueError: the file is damaged.
    """
    suffix = array_suffix(bucket, format)
    wanted = [f"latents{'_flipped' if flipped else ''}{suffix}", *([f"alpha_mask{suffix}"] if alpha_mask else [])]
    try:
        arrays = _read_arrays(path, only=wanted)
    except FileNotFoundError:
        return None, None
    latents, mask = arrays.get(wanted[0]), arrays.get(f"alpha_mask{suffix}")
    if latents is not None:
        latents = latents.astype(np.float32, copy=False) if _fits(latents, bucket, format) else None
    if mask is not None:
        mask = mask.astype(np.float32, copy=False) if _mask_fits(mask, bucket) else None
    if mask is not None and flipped:
        mask = np.ascontiguousarray(mask[:, ::-1])
    return latents, mask


def _mask_fits(mask: np.ndarray, bucket: tuple[int, int]) -> bool:
    return mask.shape == (bucket[1], bucket[0]) and np.issubdtype(mask.dtype, np.floating)


def _squeezed(name: str, values: np.ndarray) -> np.ndarray:
    """Remove the frame axis: latents of video models' VAEs may be stored as (C, 1, h, w)."""
    return values[:, 0] if name.startswith("latents") and values.ndim == 4 and values.shape[1] == 1 else values


def _fits(latents: np.ndarray, bucket: tuple[int, int], format: LatentFormat) -> bool:
    expected = (format.channels, bucket[1] // format.stride, bucket[0] // format.stride)
    return latents.shape == expected and np.issubdtype(latents.dtype, np.floating)


def _read_arrays(path: Path, suffix: str = "", only: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays whose names end with ``suffix``, or those named in ``only``.

    Raises:
        FileNotFoundError: as it says.
        ValueError: the file is damaged; the message says how.
    """
    with open_arrays(path) as file:
        names = [name for name in file.files if (name in only if only else name.endswith(suffix))]
        return {name: _squeezed(name, file[name]) for name in names}
