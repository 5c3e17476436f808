"""Find a subset's images, their captions and sizes; files are read in parallel."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from library.data.dataset_spec import SubsetSpec
from library.data.image_folder import ImageFolder
from library.data.image_io import read_size
from library.data.metadata_cache import Entry, MetadataCache, no_collection, remembers_many
from library.data.metadata_file import read_metadata
from library.data.records import ImageRecord
from library.data.stamp_ahead import has_caption
from library.errors import UserError
from library.files.regular import open_regular

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
K = TypeVar("K")
Size = tuple[int, int]

#: what is known about images, by folder and name; shared by the subsets of a run that have the same folder
Seen = dict[Path, dict[str, Size | UserError]]

#: names shown in one message
_SHOWN = 3

#: images per task of a thread: one image takes less time than handing it over
_CHUNK = 64

#: seconds per image above which threads are faster; from the page cache an image takes a tenth
_SLOW = 3e-4


@dataclass
class Faults:
    """Everything that is wrong with the images of one or more subsets, for callers that collect faults."""

    unreadable: dict[Path, str] = field(default_factory=dict)  # image -> why
    captions: dict[Path, str] = field(default_factory=dict)  # image whose caption file cannot be read -> why
    without_caption: dict[Path, str] = field(default_factory=dict)  # neither caption file nor class tokens -> ending


def discover(
    subset: SubsetSpec, index: int, seen: Seen | None = None, faults: Faults | None = None
) -> list[ImageRecord]:
    """Return all records of a subset, in the order of the images' names.

    Images that cannot be read end the run with one line each or, with ``subset.on_bad_image`` "skip", are left out
    with a warning each.

    Args:
        index: of the subset in its dataset.
        seen: read and extended, so that a folder of several subsets is measured once.
        faults: collects what would otherwise end the run, whatever ``subset.on_bad_image`` says. Images without a
            caption get an empty one, and the list may be empty. A metadata file with mistakes still raises.

    Raises:
        UserError: images or captions that cannot be read, images without caption where there are no class tokens
            (all at once); a folder of which no image is left; a metadata file with mistakes.
    """
    seen = {} if seen is None else seen
    with no_collection():
        find = _described if subset.metadata_file else _in_folder
        return find(subset, index, seen, faults)


def _in_folder(subset: SubsetSpec, index: int, seen: Seen, faults: Faults | None) -> list[ImageRecord]:
    folder = subset.image_dir
    assert folder is not None
    known = seen.setdefault(folder, {})
    reported = {name for name, found in known.items() if isinstance(found, UserError)}
    many = subset.cache_info and remembers_many(folder)
    with ImageFolder(folder, subset.caption_extension, stamps_ahead=many) as files:
        cache = MetadataCache(folder) if subset.cache_info else None
        found = _look_at_all(_Look(subset, index, files, cache, known), files.images)
    others = [f for f in found if isinstance(f, _Found)]
    if cache is not None:
        current = len(found) - sum(f.entry is None for f in others)
        # the same number, and none of them new: the same images
        if current != len(cache) or any(f.is_new for f in others):
            entries = ((f.name, f.entry if isinstance(f, _Found) else cache.entry(f.name)) for f in found)
            cache.write({name: entry for name, entry in entries if entry is not None})
    else:
        known.update((f.name, f.size) for f in others)
    bad = {f.name: f.size for f in others if isinstance(f.size, UserError)}
    known.update(bad)
    if faults is not None:
        found = _with_faults(subset, found, faults)
    else:
        problems = _bad_images(subset, [error for name, error in bad.items() if name not in reported])
        problems += _caption_problems(subset, [f for f in others if f.name not in bad] if bad else others)
        if not problems and len(bad) == len(found):
            problems.append(f"{subset.where}: image_dir: {folder}: none of its {len(bad)} images can be read")
        if problems:
            raise UserError("\n".join(problems))
    if not others:
        return found  # type: ignore[return-value]
    shared: dict[object, object] = {}
    return [
        ImageRecord(folder, f.name, _shared(f.size, shared), f.caption, index)  # type: ignore[arg-type]
        if isinstance(f, _Found)
        else f
        for f in found
        if f.name not in bad
    ]


def _described(subset: SubsetSpec, index: int, seen: Seen, faults: Faults | None) -> list[ImageRecord]:
    """Return the records of a metadata file, in its order."""
    captions = read_metadata(subset)
    new: list[UserError] = []

    def look(path: Path) -> Size | UserError:
        known = seen.setdefault(path.parent, {})
        if path.name not in known:
            found = known[path.name] = _or_error(read_size, path)
            if isinstance(found, UserError):
                new.append(found)
        return known[path.name]

    sizes = _look_at_all(lambda paths: list(map(look, paths)), list(captions))
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
    problems = _bad_images(subset, new)
    if not problems and not records:
        problems.append(f"{subset.where}: metadata_file: none of the {len(sizes)} images can be read")
    if problems:
        raise UserError("\n".join(problems))
    return records


def _bad_images(subset: SubsetSpec, errors: list[UserError]) -> list[str]:
    """Return the lines that end the run; where bad images are left out, warn and return none."""
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
            f"{subset.image_dir}; write one, set caption_extension, or give class_tokens for images without"
        )
    return problems


def _with_faults(
    subset: SubsetSpec, found: Sequence[_Found | ImageRecord], faults: Faults
) -> list[_Found | ImageRecord]:
    """Return the readable images, with a caption each; faults are recorded."""
    folder = subset.image_dir
    assert folder is not None
    whole: list[_Found | ImageRecord] = []
    for f in found:
        path = folder / f.name
        if isinstance(f, ImageRecord):
            whole.append(f)
        elif isinstance(f.size, UserError):
            faults.unreadable[path] = str(f.size)
        elif isinstance(f.caption, str):
            whole.append(f)
        else:
            if f.caption is None:
                faults.without_caption[path] = subset.caption_extension
            else:
                faults.captions[path] = str(f.caption)
            whole.append(f._replace(caption=""))
    return whole


def _shared(size: Size, shared: dict[Any, Any]) -> Size:
    """Return one object for equal sizes and sides, which many images share."""
    kept = shared.get(size)
    if kept is None:
        width, height = (shared.setdefault(side, side) for side in size)
        kept = shared[size] = (width, height)
    return kept


# ---- files ----


class _Found(NamedTuple):
    """Facts about one image that is not remembered; errors are kept, to be reported all at once."""

    name: str
    size: Size | UserError
    caption: str | UserError | None  # None: neither a caption file nor class tokens
    entry: Entry | None  # to remember
    is_new: bool  # whether the entry was not remembered


class _Look:
    """Looks at images in any thread; remembered ones become records at once."""

    def __init__(
        self,
        subset: SubsetSpec,
        index: int,
        files: ImageFolder,
        cache: MetadataCache | None,
        known: dict[str, Size | UserError],
    ) -> None:
        assert subset.image_dir is not None
        self._folder = subset.image_dir
        self._index = index
        self._class_tokens = subset.class_tokens
        self._files = files
        self._cache = cache
        self._known = known
        self._shared: dict[Any, Any] = {}

    def __call__(self, images: Sequence[str]) -> list[_Found | ImageRecord]:
        if self._cache is None:
            looked_at = (self._read(image, None) for image in images)
            return [found for found in looked_at if found is not None]
        found: list[_Found | ImageRecord] = []
        folder, index, shared, look_up = self._folder, self._index, self._shared, self._cache.look_up
        # stamped before the contents are read, so that a change in between is noticed next time
        for image, stamp in self._files.stamped(images):
            entry = look_up(image, stamp)
            if entry is None or stamp is None:
                if (read := self._read(image, stamp)) is not None:
                    found.append(read)
                continue
            width, height = entry["resolution"]
            size = (width, height)
            caption = entry["caption"] if has_caption(stamp) else self._class_tokens
            if caption is None:
                found.append(_Found(image, size, None, entry, is_new=False))
            else:
                found.append(ImageRecord(folder, image, shared.get(size) or _shared(size, shared), caption, index))
        return found

    def _read(self, image: str, read_from: str | None) -> _Found | None:
        """Read one image; ``None`` for a folder that is named like an image."""
        path, file = self._files.path, self._files.caption(image)
        size = self._known.get(image)
        if size is None:
            size = _or_error(read_size, path(image))
        if isinstance(size, UserError) and self._files.is_folder(image):
            return None
        text = self._class_tokens if file is None else _or_error(read_caption, path(file))
        if read_from is None or isinstance(size, UserError) or isinstance(text, UserError):
            return _Found(image, size, text, None, is_new=False)
        return _Found(image, size, text, Entry(caption=text or "", resolution=size, read_from=read_from), is_new=True)


def _look_at_all(look: Callable[[Sequence[K]], list[T]], images: Sequence[K]) -> list[T]:
    """Look at all images in order; in threads once files are slow to read, or images must be decoded.

    Files in the page cache are read faster by one thread, as several would wait for the interpreter's lock instead.
    """
    found = look(images[:1])  # not timed, as it may import
    chunks = [images[start : start + _CHUNK] for start in range(1, len(images), _CHUNK)]
    for done, chunk in enumerate(chunks, start=1):
        began = time.perf_counter()
        found += look(chunk)
        if time.perf_counter() - began > _SLOW * len(chunk):
            with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) * 2)) as pool:
                for more in pool.map(look, chunks[done:]):
                    found += more
            break
    return found


def _or_error(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | UserError:
    try:
        return read(*args, **kwargs)
    except UserError as error:
        return error.with_traceback(None)  # which would keep its frames' values


def read_caption(path: Path | str) -> str:
    """Read the caption file's text, without surrounding white space.

    Raises:
        UserError: it is not UTF-8, or cannot be read.
    """
    try:
        with open(open_regular(path), "rb") as file:
            return file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: the caption cannot be read ({error.strerror})") from None
