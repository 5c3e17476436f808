"""Write tags: a text file beside each image, or all in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.captioning.caption_files import CaptionFiles, Size
from library.data.dataset_config import load_json
from library.errors import UserError
from library.files.atomic import make_folder, write_text


def joined(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return the old tags, and those of the new ones that are not among them."""
    return [*old, *(tag for tag in new if tag not in old)]


def split_tags(text: str, separator: str) -> list[str]:
    """Return the tags of a text, without spaces around them."""
    return [tag.strip() for tag in text.strip().split(separator.strip()) if tag.strip()]


class TagFiles:
    """A text file beside each image.

    Args:
        append: add to the tags that are there.
    """

    def __init__(self, ending: str, separator: str, *, overwrite: bool, append: bool) -> None:
        self._files = CaptionFiles(ending, overwrite=overwrite or append)
        self._separator = separator
        self._append = append

    def kept(self, image: Path) -> bool:
        return self._files.kept(image)

    def put(self, image: Path, text: str, size: Size) -> None:
        old = self._files.read(image) if self._append else None
        if old:
            tags = joined(split_tags(old, self._separator), split_tags(text, self._separator))
            text = self._separator.join(tags)
        self._files.put(image, text, size)

    def close(self) -> None:
        self._files.close()


class TagTable:
    """One file of all images: JSON, or lines of JSON where it is named ``.jsonl``.

    It is written once, at the end or after an interruption. Entries that are there are kept.

    Raises:
        UserError: the file exists and cannot be read.
    """

    def __init__(self, path: Path, separator: str, *, overwrite: bool, append: bool) -> None:
        self._path = path
        self._separator = separator
        self._again = overwrite or append
        self._append = append
        self._lines = path.suffix.lower() == ".jsonl"
        self._entries: dict[str, dict[str, Any]] = {}
        self._changed = False
        if path.is_dir():
            raise UserError(f"--output_path {path}: is a folder; name a .json or .jsonl file")
        if path.exists():
            self._entries = self._read()

    @property
    def _field(self) -> str:
        return "caption" if self._lines else "tags"

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._lines:
            content = load_json(self._path)
            if isinstance(content, dict) and all(isinstance(entry, dict) for entry in content.values()):
                return content
            raise UserError(f'--output_path {self._path}: exists and is not {{"image": {{"tags": "..."}}, ...}}')
        try:
            rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").split("\n") if line.strip()]
            return {row.pop("image_path"): row for row in rows}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"--output_path {self._path}: exists and cannot be read ({error})") from None

    def kept(self, image: Path) -> bool:
        return not self._again and str(image) in self._entries

    def put(self, image: Path, text: str, size: Size) -> None:
        entry = self._entries.setdefault(str(image), {})
        old = entry.get(self._field)
        if self._append and old:
            tags = joined(split_tags(old, self._separator), split_tags(text, self._separator))
            text = self._separator.join(tags)
        entry |= {self._field: text, "image_size": list(size)}
        self._changed = True

    def close(self) -> None:
        if not self._changed:
            return
        make_folder(self._path.parent)
        if self._lines:
            rows = (json.dumps({"image_path": image, **entry}) for image, entry in self._entries.items())
            write_text(self._path, "".join(f"{row}\n" for row in rows))
        else:
            write_text(self._path, json.dumps(self._entries, indent=4, ensure_ascii=False))
        self._changed = False
