"""Finding a subset's pictures, their captions and sizes; headers are read in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from library.data.dataset_config import SubsetSpec
from library.data.image_io import EXTENSIONS, read_size
from library.data.metadata_file import read_metadata
from library.data.records import ImageRecord
from library.errors import UserError

T = TypeVar("T")

#: names shown in one message
_SHOWN = 3


def find_images(folder: Path) -> list[Path]:
    """The folder's pictures, in the order of their names."""
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if e.name.lower().endswith(EXTENSIONS) and e.is_file())


def discover(subset: SubsetSpec, index: int) -> list[ImageRecord]:
    """All records of a subset.

    Args:
        index: of the subset in its dataset.

    Raises:
        UserError: pictures that cannot be read, or without caption where there are no class tokens; all at once.
            A metadata file with mistakes.
    """
    described = read_metadata(subset) if subset.metadata_file else None
    paths = find_images(subset.image_dir) if described is None else list(described)
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) * 2)) as pool:
        sizes = list(pool.map(lambda path: _or_error(read_size, path), paths))
        if described is None:
            captions = list(pool.map(lambda path: _or_error(read_caption, path, subset), paths))
        else:
            captions = list(described.values())
    problems = [str(found) for found in (*sizes, *captions) if isinstance(found, UserError)]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{subset.source}: and {len(problems) - _SHOWN} more files like these"]
    missing = [path.name for path, caption in zip(paths, captions, strict=True) if caption is None]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        problems.append(
            f"{subset.where}: no caption file ({subset.caption_extension}) for {', '.join(missing[:_SHOWN])}{more} in "
            f"{subset.image_dir}; write one, set caption_extension, or give class_tokens for pictures without"
        )
    if problems:
        raise UserError("\n".join(problems))
    return [
        ImageRecord(path, size, caption, index)
        for path, size, caption in zip(paths, sizes, captions, strict=True)  # type: ignore[arg-type]
    ]


def _or_error(read: Callable[..., T], *arguments: Any) -> T | UserError:
    try:
        return read(*arguments)
    except UserError as error:
        return error


def read_caption(path: Path, subset: SubsetSpec) -> str | None:
    """The caption file's text, else the class tokens, else ``None``.

    Raises:
        UserError: a caption file that is not UTF-8, or cannot be read.
    """
    for file in _caption_files(path, subset.caption_extension):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            continue
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8 text; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{file}: the caption cannot be read ({error})") from None
        return text.strip()
    return subset.class_tokens


def _caption_files(path: Path, extension: str) -> list[Path]:
    """The published look-up: ``<stem><ext>``, then the stem without its last four parts of five or more."""
    files = [path.with_name(path.stem + extension)]
    parts = path.stem.split("_")
    if len(parts) >= 5:
        files.append(path.with_name("_".join(parts[:-4]) + extension))
    return files
