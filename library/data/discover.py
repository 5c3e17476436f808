"""Finding a subset's pictures, their captions and sizes; files are read in parallel."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from library.data.dataset_config import SubsetSpec
from library.data.image_io import is_picture_name, read_size
from library.data.metadata_cache import Entry, MetadataCache, no_collection, stamp
from library.data.metadata_file import read_metadata
from library.data.records import ImageRecord
from library.errors import UserError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
K = TypeVar("K")
Size = tuple[int, int]

#: what was found out about pictures, by folder and name; shared by the subsets of a run that have the same folder
Seen = dict[Path, dict[str, Size | UserError]]

#: names shown in one message
_SHOWN = 3

#: pictures handed to a thread at a time: one alone takes less time than handing it over
_CHUNK = 64

#: seconds a picture from which on threads are faster; from the page cache it takes a tenth
_SLOW = 3e-4

#: names that differ in case only are one file there
_key = str.lower if sys.platform in ("win32", "darwin") else str


@dataclass
class Faults:
    """What is wrong with the pictures of one or more subsets, for those who want all of it instead of an error."""

    unreadable: dict[Path, str] = field(default_factory=dict)  # picture -> why
    captions: dict[Path, str] = field(default_factory=dict)  # picture whose caption file cannot be read -> why
    without_caption: dict[Path, str] = field(default_factory=dict)  # neither caption file nor class tokens -> ending


def discover(
    subset: SubsetSpec, index: int, seen: Seen | None = None, faults: Faults | None = None
) -> list[ImageRecord]:
    """All records of a subset, in the order of the pictures' names.

    Pictures that cannot be read end the run with one line each or, with ``subset.on_bad_image`` "skip", are left out
    with a warning each.

    Args:
        index: of the subset in its dataset.
        seen: taken from and added to, so that a folder of several subsets is measured once.
        faults: filled with what would otherwise end the run, whatever ``subset.on_bad_image`` says; pictures without
            a caption get an empty one, and the list may be empty. A metadata file with mistakes still raises.

    Raises:
        UserError: pictures or captions that cannot be read, pictures without caption where there are no class tokens
            (all at once); a folder of which no picture is left; a metadata file with mistakes.
    """
    seen = {} if seen is None else seen
    with no_collection():
        find = _described if subset.metadata_file else _in_folder
        return find(subset, index, seen, faults)


def _in_folder(subset: SubsetSpec, index: int, seen: Seen, faults: Faults | None) -> list[ImageRecord]:
    folder = subset.image_dir
    assert folder is not None
    pictures, others = _list_folder(folder)
    known = seen.setdefault(folder, {})
    reported = {name for name, found in known.items() if isinstance(found, UserError)}
    cache = MetadataCache(folder) if subset.cache_info else None
    found = _look_at_all(_Look(subset, others, cache, known), pictures)
    if cache is not None:
        current = sum(f.entry is not None for f in found)
        # as many as there are, and none of them new: the same
        if current != len(cache) or any(f.is_new for f in found):
            cache.write({f.name: f.entry for f in found if f.entry is not None})
    else:
        known.update((f.name, f.size) for f in found)
    bad = {f.name: f.size for f in found if isinstance(f.size, UserError)}
    good = [f for f in found if f.name not in bad] if bad else found
    known.update(bad)
    if faults is not None:
        good = _with_faults(subset, bad, good, faults)
    else:
        problems = _bad_pictures(subset, [error for name, error in bad.items() if name not in reported])
        problems += _caption_problems(subset, good)
        if not problems and not good:
            problems.append(f"{subset.where}: image_dir: {folder}: none of its {len(bad)} pictures can be read")
        if problems:
            raise UserError("\n".join(problems))
    shared: dict[object, object] = {}
    return [
        ImageRecord(folder, f.name, _shared(f.size, shared), f.caption, index)  # type: ignore[arg-type]
        for f in good
    ]


def _described(subset: SubsetSpec, index: int, seen: Seen, faults: Faults | None) -> list[ImageRecord]:
    """The records of a metadata file, in its order."""
    captions = read_metadata(subset)
    new: list[UserError] = []

    def look(path: Path) -> Size | UserError:
        known = seen.setdefault(path.parent, {})
        if path.name not in known:
            found = known[path.name] = _or_error(read_size, path)
            if isinstance(found, UserError):
                new.append(found)
        return known[path.name]

    sizes = _look_at_all(look, list(captions))
    folders: dict[Path, Path] = {}
    shared: dict[object, object] = {}
    records = [
        ImageRecord(folders.setdefault(path.parent, path.parent), path.name, _shared(size, shared), caption, index)
        for (path, caption), size in zip(captions.items(), sizes, strict=True)
        if not isinstance(size, UserError)
    ]
    if faults is not None:
        pairs = zip(captions, sizes, strict=True)
        faults.unreadable.update((path, str(size)) for path, size in pairs if isinstance(size, UserError))
        return records
    problems = _bad_pictures(subset, new)
    if not problems and not records:
        problems.append(f"{subset.where}: metadata_file: none of the {len(sizes)} pictures can be read")
    if problems:
        raise UserError("\n".join(problems))
    return records


def _bad_pictures(subset: SubsetSpec, errors: list[UserError]) -> list[str]:
    """Lines that end the run; none, and warnings, where bad pictures are left out."""
    if subset.on_bad_image != "skip":
        return [str(error) for error in errors]
    for error in errors:
        logger.warning("%s; left out (--on_bad_image skip)", error)
    return []


def _caption_problems(subset: SubsetSpec, found: list[_Found]) -> list[str]:
    problems = [str(f.caption) for f in found if isinstance(f.caption, UserError)]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{subset.source}: and {len(problems) - _SHOWN} more captions like these"]
    missing = [f.name for f in found if f.caption is None]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        problems.append(
            f"{subset.where}: no caption file ({subset.caption_extension}) for {', '.join(missing[:_SHOWN])}{more} in "
            f"{subset.image_dir}; write one, set caption_extension, or give class_tokens for pictures without"
        )
    return problems


def _with_faults(
    subset: SubsetSpec, bad: Mapping[str, Size | UserError], good: list[_Found], faults: Faults
) -> list[_Found]:
    """``good`` with a caption each; what was wrong is noted."""
    folder = subset.image_dir
    assert folder is not None
    faults.unreadable.update((folder / name, str(error)) for name, error in bad.items())
    whole = []
    for found in good:
        if isinstance(found.caption, UserError):
            faults.captions[folder / found.name] = str(found.caption)
        elif found.caption is None:
            faults.without_caption[folder / found.name] = subset.caption_extension
        whole.append(found if isinstance(found.caption, str) else found._replace(caption=""))
    return whole


def _shared(size: Size, shared: dict[object, object]) -> Size:
    """One object for equal sizes and sides, which most pictures have in common with others."""
    kept = shared.get(size)
    if kept is None:
        width, height = (shared.setdefault(side, side) for side in size)
        kept = shared[size] = (width, height)
    return kept  # type: ignore[return-value]


# ---- files ----

_Files = dict[str, "os.DirEntry[str]"]


def _list_folder(folder: Path) -> tuple[list[os.DirEntry[str]], _Files]:
    """Pictures in the order of their names, and all other files by ``_key``."""
    pictures, others = [], {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not is_picture_name(name):
                others[_key(name)] = entry
            elif not entry.is_dir():
                # a link that leads nowhere is one too, to be named as unreadable
                pictures.append(entry)
    pictures.sort(key=attrgetter("name"))
    return pictures, others


class _Found(NamedTuple):
    """About one picture; errors are kept, to be told all at once."""

    name: str
    size: Size | UserError
    caption: str | UserError | None  # None: neither a caption file nor class tokens
    entry: Entry | None  # to remember
    is_new: bool  # whether the entry was not remembered


class _Look:
    """Finds out about one picture after the other, from any thread."""

    def __init__(
        self, subset: SubsetSpec, others: _Files, cache: MetadataCache | None, known: dict[str, Size | UserError]
    ) -> None:
        self._extension = subset.caption_extension
        self._class_tokens = subset.class_tokens
        self._others = others
        self._cache = cache
        self._known = known

    def __call__(self, picture: os.DirEntry[str]) -> _Found:
        name = picture.name
        file = self._caption_file(name)
        read_from = None
        if self._cache is not None:
            # before the contents are read: what changes in between is out of date next time
            read_from = _stamp(picture, file)
            entry = self._cache.look_up(name, read_from) if read_from is not None else None
            if entry is not None:
                width, height = entry["resolution"]
                caption = self._class_tokens if file is None else entry["caption"]
                return _Found(name, (width, height), caption, entry, False)
        size = self._known.get(name) or _or_error(read_size, picture.path)
        text = self._class_tokens if file is None else _or_error(read_caption, file.path)
        if read_from is None or isinstance(size, UserError) or isinstance(text, UserError):
            return _Found(name, size, text, None, is_new=False)
        return _Found(name, size, text, Entry(caption=text or "", resolution=size, read_from=read_from), is_new=True)

    def _caption_file(self, name: str) -> os.DirEntry[str] | None:
        """The published look-up: ``<stem><ext>``, then the stem without its last four parts of five or more."""
        stem = name.rpartition(".")[0]
        file = self._others.get(_key(stem + self._extension))
        if file is None and stem.count("_") >= 4:
            file = self._others.get(_key(stem.rsplit("_", 4)[0] + self._extension))
        return file


def _stamp(picture: os.DirEntry[str], caption: os.DirEntry[str] | None) -> str | None:
    try:
        if caption is None:
            return stamp(picture.stat(), None, "")
        return stamp(picture.stat(), caption.stat(), caption.name)
    except OSError:
        return None  # gone, or a link that leads nowhere: reading says what is wrong


def _look_at_all(look: Callable[[K], T], pictures: list[K]) -> list[T]:
    """In order; in threads from where on files are waited for, or pictures must be decoded.

    Files in the page cache are read faster by one thread, as several would wait for the interpreter's lock instead.
    """
    found = list(map(look, pictures[:1]))  # not timed, as it may import
    chunks = [pictures[start : start + _CHUNK] for start in range(1, len(pictures), _CHUNK)]
    for done, chunk in enumerate(chunks, start=1):
        began = time.perf_counter()
        found += map(look, chunk)
        if time.perf_counter() - began > _SLOW * len(chunk):
            with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) * 2)) as pool:
                for more in pool.map(lambda chunk: list(map(look, chunk)), chunks[done:]):
                    found += more
            break
    return found


def _or_error(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | UserError:
    try:
        return read(*args, **kwargs)
    except UserError as error:
        return error.with_traceback(None)  # which would keep its frames' values


def read_caption(path: Path | str) -> str:
    """The caption file's text, without white space around it.

    Raises:
        UserError: it is not UTF-8, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: the caption cannot be read ({error.strerror})") from None
