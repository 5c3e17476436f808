"""Caption files that nothing reads: the most common mistake with folders named ``<repeats>_<class tokens>``.

There the class tokens are the caption of every image without a caption file, so a wrong ``caption_extension`` raises
no error: all captions are ignored and only the class tokens are trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from library.data.dataset_spec import DatasetConfig, SubsetSpec
from library.data.image_io import EXTENSIONS
from library.data.stamp_ahead import by_name, caption_of, images_and_others
from library.errors import Doubtful

#: usual extensions of caption files
_ENDINGS = (".txt", ".caption")


def unread_captions(config: DatasetConfig) -> list[Doubtful]:
    """Return one warning for each folder whose images get class tokens although there are caption files.

    It names caption files with another extension, and images without a caption file where others have one. ``--strict``
    turns the warnings into errors.
    """
    found: dict[tuple[Path | None, str, str | None], list[Doubtful]] = {}
    for subset in (subset for dataset in config.datasets for subset in dataset.subsets):
        folder = (subset.image_dir, subset.caption_extension, subset.class_tokens)
        if folder not in found:
            found[folder] = list(_of_subset(subset))
    return [warning for warnings in found.values() for warning in warnings]


def _of_subset(subset: SubsetSpec) -> Iterator[Doubtful]:
    folder, extension, tokens = subset.image_dir, subset.caption_extension, subset.class_tokens
    # without class tokens a missing caption file ends the run, see ``discover``
    if folder is None or subset.metadata_file is not None or tokens is None:
        return
    images, names = images_and_others(os.listdir(folder), EXTENSIONS)
    others = by_name(names)
    missing = [image for image in images if caption_of(image, others, extension) is None]
    if not missing:
        return
    whose = "all images" if len(missing) == len(images) else f"{len(missing)} of {len(images)} images"
    for ending in _ENDINGS:
        unread = [image for image in missing if ending != extension and caption_of(image, others, ending)]
        if unread:
            yield Doubtful(
                f"{subset.where}: caption_extension {extension}: {len(unread)} {ending} files in {folder} have no "
                f'effect, and "{tokens}" is the caption of {whose}; set caption_extension to {ending} '
                f"(--caption_extension {ending})"
            )
            return
    if len(missing) < len(images):
        yield Doubtful(
            f"{subset.where}: {len(missing)} of {len(images)} images in {folder} have no caption file ({extension}), "
            f'so "{tokens}" is their caption: {_some(sorted(missing))}'
        )


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
