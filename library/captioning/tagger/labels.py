"""The tags that a tagger knows, as the model's folder lists them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError

#: label file of the WD taggers, and of taggers with a mapping
CSV, MAPPING = "selected_tags.csv", "tag_mapping.json"

#: numbers in the CSV, which are Danbooru's, and 9 of the WD taggers
_CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
#: categories of a mapping
CATEGORIES = ("rating", "general", "character", "copyright", "meta", "model", "quality", "artist")


@dataclass(frozen=True)
class Label:
    name: str
    category: str  # of CATEGORIES


def read_labels(path: Path) -> list[Label]:
    """Return the labels in the order of the model's outputs.

    Raises:
        UserError: the file is missing, or of another form.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it lists the model's tags") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    labels = _mapping(path, text) if path.suffix == ".json" else _csv(path, text)
    if not labels:
        raise UserError(f"{path}: lists no tags")
    return labels


def _csv(path: Path, text: str) -> list[Label]:
    rows = csv.DictReader(text.splitlines())
    if not {"name", "category"} <= set(rows.fieldnames or ()):
        raise UserError(f"{path}: must have the columns tag_id,name,category,count")
    return [Label(row["name"], _category(path, row["name"], _CATEGORIES.get(row["category"]))) for row in rows]


def _mapping(path: Path, text: str) -> list[Label]:
    try:
        content = {int(index): entry for index, entry in json.loads(text).items()}
        labels = [content[index] for index in range(len(content))]
        return [Label(str(e["tag"]), _category(path, e["tag"], str(e["category"]).lower())) for e in labels]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path}: must be {{"0": {{"tag": "...", "category": "..."}}, "1": ...}}') from None


def _category(path: Path, name: str, category: str | None) -> str:
    if category not in CATEGORIES:
        raise UserError(f"{path}: {name}: is of no category that is known ({', '.join(CATEGORIES)})")
    return category
