"""Latent cache files: the published npz layout, with a stamp of what the latents were made from.

A file lies beside its picture as ``<stem>_<W>x<H><suffix>``, W x H being the picture's own size. Files of the
predecessor have no stamp; they are used when their arrays fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from library.architectures.base import LatentFormat
from library.files.atomic import atomic_path

logger = logging.getLogger(__name__)

STAMP = "stamp"
_STAMP_VERSION = 1


@dataclass(frozen=True)
class CachedLatents:
    """What a cache holds for one picture."""

    latents: np.ndarray  # float32 (C, h, w), as the family stores them
    latents_flipped: np.ndarray | None  # of the mirrored picture
    original_size: tuple[int, int]  # (W, H)
    crop_ltrb: tuple[int, int, int, int]  # in the resized picture


@dataclass(frozen=True)
class Stamp:
    """What latents are a function of, besides the code."""

    image: str  # hash of the file's bytes
    image_size: int  # bytes
    image_mtime_ns: int
    vae: str  # identity of the VAE
    bucket: tuple[int, int]  # (W, H)
    interpolation: str | None
    version: int = _STAMP_VERSION

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Stamp | None:
        """``None`` for a stamp of another version or form."""
        try:
            values = json.loads(text)
            stamp = Stamp(**{**values, "bucket": tuple(values["bucket"])})
        except (ValueError, TypeError, KeyError):
            return None
        return stamp if stamp.version == _STAMP_VERSION else None


def make_stamp(image: Path, *, vae: str, bucket: tuple[int, int], interpolation: str | None) -> Stamp:
    """The stamp of latents made now; reads the whole picture file."""
    found = image.stat()
    return Stamp(image_digest(image), found.st_size, found.st_mtime_ns, vae, bucket, interpolation)


def image_digest(image: Path) -> str:
    """Hash of a picture file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with image.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_current(stamp: Stamp, image: Path, *, vae: str, bucket: tuple[int, int], interpolation: str | None) -> bool:
    """Whether latents with this stamp are what would be made now.

    A picture of the same size and time is taken as unchanged; a copied or touched one is compared by its bytes.
    """
    if (stamp.vae, stamp.bucket, stamp.interpolation) != (vae, bucket, interpolation):
        return False
    found = image.stat()
    if found.st_size != stamp.image_size:
        return False
    return found.st_mtime_ns == stamp.image_mtime_ns or image_digest(image) == stamp.image


def cache_path(image: Path, size: tuple[int, int], format: LatentFormat) -> Path:
    """Where the latents of a picture of ``size`` (W, H) lie; an old ``<stem>.npz`` is used if it is there."""
    old = image.with_suffix(".npz")
    if not format.multi_resolution and old.exists():
        return old
    return image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}{format.cache_suffix}")


def _key_suffix(bucket: tuple[int, int], format: LatentFormat) -> str:
    """Files of several resolutions name each array by its latent size, ``_<h>x<w>``."""
    if not format.multi_resolution:
        return ""
    return f"_{bucket[1] // format.stride}x{bucket[0] // format.stride}"


def write_cache(path: Path, cached: CachedLatents, stamp: Stamp, format: LatentFormat) -> None:
    """Write or, with several resolutions in a file, add to a cache file; atomic."""
    suffix = _key_suffix(stamp.bucket, format)
    arrays: dict[str, np.ndarray] = {}
    if format.multi_resolution and path.exists():
        try:
            with np.load(path) as old:
                arrays.update({name: old[name] for name in old.files})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s: damaged (%s) and made again", path, error)
    arrays[f"latents{suffix}"] = cached.latents.astype(np.float32)
    arrays[f"original_size{suffix}"] = np.array(cached.original_size, dtype=np.int64)
    arrays[f"crop_ltrb{suffix}"] = np.array(cached.crop_ltrb, dtype=np.int64)
    arrays.pop(f"latents_flipped{suffix}", None)
    if cached.latents_flipped is not None:
        arrays[f"latents_flipped{suffix}"] = cached.latents_flipped.astype(np.float32)
    arrays[f"{STAMP}{suffix}"] = np.array(stamp.to_text())
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_cache(path: Path, bucket: tuple[int, int], format: LatentFormat) -> tuple[CachedLatents, Stamp | None] | None:
    """Latents for ``bucket`` (W, H), or ``None`` where there are none of that size.

    Raises:
        ValueError: the file is damaged; the message says how.
    """
    suffix = _key_suffix(bucket, format)
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if f"latents{suffix}" not in names:
                return None
            latents = file[f"latents{suffix}"]
            flipped = file[f"latents_flipped{suffix}"] if f"latents_flipped{suffix}" in names else None
            original = tuple(int(n) for n in file[f"original_size{suffix}"])
            crop = tuple(int(n) for n in file[f"crop_ltrb{suffix}"])
            stamp = Stamp.from_text(str(file[f"{STAMP}{suffix}"])) if f"{STAMP}{suffix}" in names else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    expected = (format.channels, bucket[1] // format.stride, bucket[0] // format.stride)
    if latents.shape != expected or (flipped is not None and flipped.shape != expected):
        return None
    return CachedLatents(latents, flipped, original, crop), stamp  # type: ignore[arg-type]
