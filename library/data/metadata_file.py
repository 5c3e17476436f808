"""Metadata files of the fine-tuning method: captions and tags of many images in one .json or .jsonl file.

JSON: ``{"<image>": {"caption": ..., "tags": ...}, ...}``; JSON lines: an object with ``image_path`` in each line.
Sizes in it (``image_size``) are not used: the images' own headers are read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from library.data.dataset_config import load_json
from library.data.dataset_spec import SubsetSpec
from library.data.image_io import is_image_name
from library.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

#: mistakes shown in one message
_SHOWN = 3

#: known fields of an entry; others are ignored, because old scripts add their own
_FIELDS = ("image_path", "caption", "tags", "image_size")


@dataclass(frozen=True)
class _Entry:
    where: str  # for messages: "line 3", or the key
    name: str  # the image as it is written
    fields: Mapping[str, Any]


class _Mistake(Exception):
    """A mistake in one entry; becomes a line of the UserError."""


def read_metadata(subset: SubsetSpec) -> dict[Path, str]:
    """Return image and caption of every entry, in the file's order; of two entries of one image the later counts.

    Raises:
        UserError: a file that cannot be read; entries that are wrong or whose image is missing. All at once, each
            with file and key or line.
    """
    file = subset.metadata_file
    assert file is not None
    images = _Images(subset.image_dir)
    found: dict[str, tuple[Path, str]] = {}
    mistakes: list[str] = []
    twice: list[str] = []
    for entry in _entries(file, mistakes):
        try:
            caption = _caption(entry.fields, subset.captions.separator)
            path = images.find(entry.name)
        except _Mistake as mistake:
            mistakes.append(f"{file}: {entry.where}: {mistake}")
            continue
        same = os.path.abspath(path)
        if same in found:
            twice.append(entry.where)
        found[same] = (path, caption)
    if mistakes:
        if len(mistakes) > _SHOWN:
            mistakes[_SHOWN:] = [f"{file}: and {len(mistakes) - _SHOWN} more entries like these"]
        raise UserError("\n".join(mistakes))
    if not found:
        raise UserError(f"{file}: has no entries")
    if twice:
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        logger.warning("%s: %s%s: of an image that stands there before; the later entry counts", file, twice[0], more)
    return dict(found.values())


def _entries(file: Path, mistakes: list[str]) -> Iterator[_Entry]:
    if file.suffix.lower() == ".jsonl":
        yield from _of_lines(file, mistakes)
        return
    try:
        content = load_json(file)
    except UserError as error:
        hint = "; name a file with one entry a line .jsonl" if "Extra data: line 2" in str(error) else ""
        raise UserError(f"{error}{hint}") from None
    if not isinstance(content, Mapping):
        hint = "; name a file with one entry a line .jsonl" if isinstance(content, list) else ""
        raise UserError(f'{file}: must be {{"image": {{"caption": "..."}}, ...}}{hint}')
    for name, fields in content.items():
        if isinstance(fields, Mapping):
            yield _Entry(f'"{name}"', name, fields)
        else:
            mistakes.append(f'{file}: "{name}": must be {{"caption": "...", "tags": "..."}}')


def _of_lines(file: Path, mistakes: list[str]) -> Iterator[_Entry]:
    try:
        # not splitlines, which also ends lines at characters that JSON allows inside of text
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            mistakes.append(f"{file}: {where}: not valid JSON: {error}")
            continue
        name = fields.get("image_path") if isinstance(fields, Mapping) else None
        if isinstance(name, str) and name:
            yield _Entry(where, name, fields)
        else:
            hint = _misspelt(fields, ["image_path"]) if isinstance(fields, Mapping) else ""
            mistakes.append(f'{file}: {where}: must be {{"image_path": "...", "caption": "..."}}{hint}')


def _caption(fields: Mapping[str, Any], separator: str) -> str:
    """Return caption and tags as one text; tags are appended to every line of a caption."""
    texts = {}
    for name in ("caption", "tags"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise _Mistake(f"{name}: {value!r}: write text in quotes")
        if value is not None and not _is_text(value):
            raise _Mistake(f"{name}: holds half a character, {ascii(value)[:60]}; write it again")
        texts[name] = value
    caption, tags = texts["caption"], texts["tags"]
    if caption is None and tags is None:
        raise _Mistake(f"has neither caption nor tags{_misspelt(fields, ['caption', 'tags'])}")
    caption, tags = (caption or "").strip(), (tags or "").strip()
    if not caption or not tags:
        return caption or tags
    tags = f"{separator} ".join(_lines(tags, separator))
    return "\n".join(f"{line}{separator} {tags}" for line in _lines(caption, separator))


def _is_text(value: str) -> bool:
    """Whether a text can be written; JSON may hold half characters where a program cut a text off."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _misspelt(fields: Mapping[str, Any], wanted: list[str]) -> str:
    """Return a hint if a field looks like a misspelt known field."""
    hints = (did_you_mean(name, wanted) for name in fields if name not in _FIELDS)
    return next(filter(None, hints), "")


def _lines(text: str, separator: str) -> list[str]:
    """Return non-empty lines without a separator at their end."""
    return [line.strip().removesuffix(separator).rstrip() for line in text.splitlines() if line.strip()]


class _Images:
    """Finds images by name; each folder is listed once."""

    def __init__(self, image_dir: Path | None) -> None:
        self._image_dir = image_dir
        # strings, because making a hundred thousand paths is slow
        self._bases = [""] if image_dir is None else [str(image_dir), ""]
        self._folders: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> Path:
        """Find the image of an absolute path, or of one relative to ``image_dir`` or to the working folder.

        The extension may be missing, because old scripts omit it in relative paths.
        """
        names = [name] if os.sep == "\\" or "\\" not in name else [name, name.replace("\\", "/")]
        for written in names:
            for base in self._bases:
                folder, stem = os.path.split(os.path.join(base, written))
                folder = folder or os.curdir
                matches = self._names_in(folder).get(stem, [])
                if len(matches) > 1:
                    raise _Mistake(f"may be {' or '.join(sorted(matches))} in {folder}; write the ending")
                if matches:
                    return Path(os.path.join(folder, matches[0]))
        if self._image_dir is not None:
            bare = name.replace("\\", "/").rpartition("/")[2]
            moved = bare != name and bare in self._names_in(str(self._image_dir))
            hint = f"; there is {bare}: write the name without its old folder" if moved else ""
            raise _Mistake(f"no image {name} in {self._image_dir}{hint}")
        if Path(name).is_absolute() or PureWindowsPath(name).is_absolute():
            raise _Mistake(f"no such image: {name}")
        raise _Mistake(f"no image {name} in the working folder; give image_dir, the folder of the images")

    def _names_in(self, folder: str) -> dict[str, list[str]]:
        """Return names of images by their spellings: in full, which is unambiguous, or without extension."""
        if folder not in self._folders:
            listing: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    names = [e.name for e in entries if is_image_name(e.name)]
            except (OSError, ValueError):  # the latter of a name with a null character
                names = []
            for found in names:
                listing.setdefault(os.path.splitext(found)[0], []).append(found)
            listing.update({found: [found] for found in names})
            self._folders[folder] = listing
        return self._folders[folder]
