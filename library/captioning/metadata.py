"""Read, change and write metadata files of the fine-tuning method; training reads them in ``data/metadata_file.py``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.captioning.caption_files import caption_path
from library.data.dataset_config import load_json
from library.data.discover import read_caption
from library.errors import UserError
from library.files.atomic import make_folder, write_text

logger = logging.getLogger(__name__)

Metadata = dict[str, dict[str, Any]]

_SHOWN = 3


def read_metadata(path: Path, flag: str) -> Metadata:
    """Return the entries of a file.

    Raises:
        UserError: it cannot be read, or has another form.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    content = load_json(path)
    if not isinstance(content, Mapping) or not all(isinstance(entry, Mapping) for entry in content.values()):
        raise UserError(f'{flag} {path}: must be {{"image": {{"caption": "...", "tags": "..."}}, ...}}')
    return {name: dict(entry) for name, entry in content.items()}


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a file atomically, as published: two spaces of indent, ASCII alone."""
    make_folder(path.parent)
    write_text(path, json.dumps(metadata, indent=2))


def keys_of(images: Sequence[Path], *, full_path: bool) -> dict[str, Path]:
    """Return the images by their names in metadata: the path, or the name without ending.

    Raises:
        UserError: two images have one name.
    """
    found: dict[str, Path] = {}
    for image in images:
        name = str(image) if full_path else image.stem
        if name in found:
            raise UserError(
                f"{found[name]} and {image} have the same name in the metadata; give --full_path, or rename one"
            )
        found[name] = image
    return found


@dataclass(frozen=True)
class Merge:
    """Texts of files beside images that go into one field of their entries.

    ``clean`` is applied to each text.
    """

    field: str  # "caption" or "tags"
    ending: str
    debug: bool = False
    clean: Callable[[str], str] = str.strip


def merge_texts(metadata: Metadata, images: Mapping[str, Path], merge: Merge) -> int:
    """Put each image's text into its entry, which keeps its other fields; return how many there were.

    Raises:
        UserError: no image has a text file; files that are not UTF-8, all at once.
    """
    missing, problems, count = [], [], 0
    for name, image in images.items():
        file = caption_path(image, merge.ending)
        if not file.exists():
            missing.append(file.name)
            continue
        try:
            text = merge.clean(read_caption(file))
        except UserError as error:
            problems.append(str(error))
            continue
        metadata.setdefault(name, {})[merge.field] = text
        count += 1
        if merge.debug:
            print(f"{image}: {text}")
    if problems:
        raise UserError("\n".join(problems))
    if not count:
        raise UserError(f"no image has a {merge.ending} file; --caption_extension names their ending")
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        logger.warning("left out, as there is no %s%s", ", ".join(missing[:_SHOWN]), more)
    return count
