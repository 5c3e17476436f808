"""Files of encoded captions: the published npz layout, with a stamp of what they were made from.

A file is beside its image, named ``<stem><suffix>``, and holds the outputs of text encoders, without batch axis, for
every caption that the image may have. Those of the first are under the published names; further ones, which the
predecessor does not know, under ``<name>.variant<n>``. The empty caption of all images of a folder has one file,
``empty_caption<suffix>``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.architectures.common.clean_text import is_changed_by_cleaning
from library.architectures.formats import TextFormat
from library.architectures.model_info import WeightsIdentity
from library.architectures.ragged import padded, trimmed
from library.data.array_file import ArrayFile, open_arrays
from library.data.cache_format import STAMP
from library.files.atomic import atomic_path

EMPTY_STEM = "empty_caption"
_STAMP_VERSION = 1

#: conditioning of one caption, by name, without the batch
Row = Mapping[str, Tensor]


@dataclass(frozen=True)
class TextSettings:
    """Everything that encoded captions depend on, besides the captions."""

    encoders: WeightsIdentity
    dtype: torch.dtype  # of encoders and outputs
    max_token_length: int | None
    clip_skip: int | None
    weighted: bool
    own: Mapping[str, object] = field(default_factory=dict)  # of the family alone


@dataclass(frozen=True)
class TextStamp:
    """Everything that a file was made from."""

    captions: tuple[str, ...]  # final ones, in the order of the arrays
    encoder_files: str
    encoders: str
    dtype: str
    max_token_length: int | None
    clip_skip: int | None
    weighted: bool
    own: Mapping[str, object] = field(default_factory=dict)
    cleaned: bool = False  # whether captions were cleaned as CLIP does; older files do not say so
    version: int = _STAMP_VERSION

    @staticmethod
    def of(captions: Sequence[str], settings: TextSettings) -> TextStamp:
        """Return the stamp of captions encoded now; reads the encoders' weights the first time."""
        return TextStamp(
            captions=tuple(captions),
            encoder_files=settings.encoders.files,
            encoders=settings.encoders.weights,
            dtype=str(settings.dtype).removeprefix("torch."),
            max_token_length=settings.max_token_length,
            clip_skip=settings.clip_skip,
            weighted=settings.weighted,
            own=dict(settings.own),
            cleaned=True,
        )

    @staticmethod
    def from_text(text: str) -> TextStamp | None:
        """Parse a stamp; ``None`` for another version or form."""
        try:
            values = json.loads(text)
            stamp = TextStamp(**{**values, "captions": tuple(values["captions"])})
        except (ValueError, TypeError, KeyError):
            return None
        return stamp if stamp.version == _STAMP_VERSION else None

    def outdated(self, captions: Sequence[str], settings: TextSettings) -> str | None:
        """Return why a file with this stamp cannot be used for these captions; ``None`` if it can.

        It may hold more captions. Weights are read only if the encoders' files were changed or moved.
        """
        if not set(captions) <= set(self.captions):
            return "made for other captions"
        if not self.cleaned and any(map(is_changed_by_cleaning, captions)):
            return "made before captions were cleaned as CLIP does (curly quotes, full-width letters and the like)"
        made_with = {
            "--max_token_length": (self.max_token_length, settings.max_token_length),
            "--clip_skip": (self.clip_skip, settings.clip_skip),
            "--weighted_captions": (self.weighted, settings.weighted),
            "precision": (self.dtype, str(settings.dtype).removeprefix("torch.")),
            **{f"--{name}": (self.own.get(name), value) for name, value in settings.own.items()},
        }
        for name, (before, now) in made_with.items():
            if before != now:
                return f"made with another {name} ({before}, now {now})"
        if self.encoder_files != settings.encoders.files and self.encoders != settings.encoders.weights:
            return "made with another text encoder or tokenizer"
        return None


def text_path(image: Path, caption: str, format: TextFormat) -> Path:
    """Return the cache file of a caption of an image."""
    return image.with_name(f"{image.stem if caption else EMPTY_STEM}{format.cache_suffix}")


def write_texts(path: Path, rows: Sequence[Row], stamp: TextStamp, format: TextFormat) -> None:
    """Write the outputs of ``stamp.captions``, in their order. bfloat16 is stored as float32, as published.

    It is atomic, also when several programs write the same file.
    """
    arrays: dict[str, Any] = {
        _array_name(name, place): _to_numpy(_stored(row[name], format.stored_lengths.get(name)))
        for place, row in enumerate(rows)
        for name in format.arrays
    }
    if format.extras is not None:
        arrays |= {name: _to_numpy(values) for name, values in format.extras(rows[0]).items()}
    arrays[STAMP] = np.array(json.dumps(asdict(stamp)))
    with atomic_path(path, by_many=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_stamp(path: Path, format: TextFormat) -> TextStamp | None:
    """Return the stamp of a file and check every byte; ``None`` if it has no stamp.

    Raises:
        FileNotFoundError: as it says.
        ValueError: the file is damaged, lacks arrays, or holds values that are not finite; the message says which.
    """
    with open_arrays(path) as file:
        stamp = _stamp(file)
        arrays = {name: file[name] for name in file.files}
    for place in range(len(stamp.captions) if stamp is not None else 1):
        for name, axes in format.arrays.items():
            found = arrays.get(_array_name(name, place))
            if found is None or found.ndim != len(axes):
                raise ValueError(f"{path}: damaged (no {_array_name(name, place)} with axes {', '.join(axes)})")
            if np.issubdtype(found.dtype, np.floating) and not np.isfinite(found).all():
                raise ValueError(f"{path}: damaged ({_array_name(name, place)} holds values that are not finite)")
    return stamp


def read_row(path: Path, caption: str, place: int, format: TextFormat, *, trust: bool) -> Row | None:
    """Read the outputs of one caption from a file that ``read_stamp`` accepted, or ``None`` if it has none.

    Args:
        place: of the caption among the image's.
        trust: whether a file without the caption gives the one at the same place.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with open_arrays(path) as file:
            stamp = _stamp(file)
            if stamp is not None and caption in stamp.captions:
                place = stamp.captions.index(caption)
            elif trust:
                place %= len(stamp.captions) if stamp is not None else 1
            else:
                return None
            names = {name: _array_name(name, place) for name in format.arrays}
            if not set(names.values()) <= set(file.files):
                return None
            row = {name: torch.from_numpy(file[stored]) for name, stored in names.items()}
            return trimmed(row, format.ragged)
    except FileNotFoundError:
        return None


def _stored(values: Tensor, length: int | None) -> Tensor:
    return values if length is None else padded(values, length)


def _array_name(name: str, place: int) -> str:
    return name if place == 0 else f"{name}.variant{place}"


def _stamp(file: ArrayFile) -> TextStamp | None:
    return TextStamp.from_text(str(file[STAMP])) if STAMP in file.files else None


def _to_numpy(values: Tensor) -> np.ndarray:
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
