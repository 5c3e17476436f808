"""Find the mask or conditioning image of each image, and check how a trainer may use them."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

from library.data.dataset_spec import DatasetConfig, SubsetSpec
from library.data.image_io import is_image_name, read_size
from library.data.records import ImageRecord
from library.data.same_file import same_file
from library.errors import UserError

logger = logging.getLogger(__name__)

#: role of the images in ``conditioning_data_dir``: loss weights, or model input
Role = Literal["mask", "image"]

#: names shown in one message
_SHOWN = 3
#: larger differences of aspect ratios are not rounding of a resized copy
_ASPECT_TOLERANCE = 0.03


def check_roles(config: DatasetConfig, role: Role, *, masked_loss: bool) -> None:
    """Refuse mask and conditioning images that would not be used, and missing ones.

    Args:
        role: of conditioning images, decided by the trainer.
        masked_loss: whether the user asked for it.

    Raises:
        UserError: one line for each subset.
    """
    subsets = [subset for dataset in config.datasets for subset in dataset.subsets]
    problems = []
    if role == "image":
        problems += [
            f"{subset.where}: conditioning_data_dir: is missing: name the folder with the conditioning images"
            for subset in subsets
            if subset.conditioning_dir is None
        ]
    elif not masked_loss:
        problems += [
            f"{subset.where}: conditioning_data_dir: mask images are used with --masked_loss only; add it, or remove "
            "the key"
            for subset in subsets
            if subset.conditioning_dir is not None
        ]
    elif not any(subset.conditioning_dir is not None or subset.alpha_mask for subset in subsets):
        problems.append(
            f"--masked_loss: {config.source} names no masks; set conditioning_data_dir to the folder with mask "
            "images, or alpha_mask = true, in a subset"
        )
    if problems:
        raise UserError("\n".join(problems))


def pair(subset: SubsetSpec, records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return records with the conditioning image of the same name (with any extension); unchanged if there is no
    folder.

    Raises:
        UserError: conditioning images that are missing, ambiguous or unreadable; all at once.
    """
    folder = subset.conditioning_dir
    if folder is None:
        return list(records)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in _images_in(folder):
        by_stem[path.stem].append(path)
    problems = []
    missing = [record.path.name for record in records if record.path.stem not in by_stem]
    if missing:
        problems.append(
            f"{subset.where}: conditioning_data_dir: {folder} has no image of the same name for {_some(missing)}"
        )
    wanted = {record.path.stem for record in records}
    for stem in sorted(wanted):
        if len(by_stem.get(stem, ())) > 1:
            names = ", ".join(path.name for path in by_stem[stem])
            problems.append(
                f"{subset.where}: conditioning_data_dir: {folder} has several images of one name: {names}; keep one"
            )
    if problems:
        raise UserError("\n".join(problems))
    return _readable(subset, [replace(record, conditioning=by_stem[record.path.stem][0]) for record in records])


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())


def _readable(subset: SubsetSpec, records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Read every header, so that a damaged image is found now instead of in the middle of a run.

    With ``on_bad_image`` "skip", records with a damaged one are left out.
    """

    def aspect(path: Path) -> float | UserError:
        try:
            width, height = read_size(path)
        except UserError as error:
            return error
        return width / height

    paths = [record.conditioning for record in records if record.conditioning is not None]
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) * 2)) as pool:
        aspects = list(pool.map(aspect, paths))
    damaged = [str(found) for found in aspects if isinstance(found, UserError)]
    if damaged and subset.on_bad_image == "skip" and len(damaged) < len(records):
        for line in damaged:
            logger.warning("%s; left out with its image (--on_bad_image skip)", line)
    elif damaged:
        more = [f"{subset.conditioning_dir}: and {len(damaged) - _SHOWN} more files like these"]
        raise UserError("\n".join(damaged[:_SHOWN] + (more if len(damaged) > _SHOWN else [])))
    whole = [(record, a) for record, a in zip(records, aspects, strict=True) if not isinstance(a, UserError)]
    stretched = [
        record.path.name
        for record, found in whole
        if abs(found * record.size[1] / record.size[0] - 1) > _ASPECT_TOLERANCE
    ]
    if stretched:
        logger.warning(
            "%s: conditioning_data_dir: other aspect ratios than their images, to which they are stretched: %s",
            *(subset.where, _some(stretched)),
        )
    return [record for record, _ in whole]


def check_none_is_extra(subsets: Iterable[tuple[SubsetSpec, Sequence[ImageRecord]]]) -> None:
    """Refuse conditioning images that belong to no image: a name is misspelt, or an image is missing.

    Args:
        subsets: every subset of the run with its records, as several may share a folder.

    Raises:
        UserError: one line for each folder.
    """
    spelt: dict[Hashable, Path] = {}
    known: dict[Hashable, set[str]] = defaultdict(set)  # names without ending
    for subset, records in subsets:
        if subset.conditioning_dir is None:
            continue
        folder = same_file(subset.conditioning_dir)  # which subsets may name differently
        spelt.setdefault(folder, subset.conditioning_dir)
        known[folder] |= {record.path.stem for record in records}
        if subset.on_bad_image == "skip":  # images that were left out have masks, too
            of_images = {record.folder for record in records} | ({subset.image_dir} if subset.image_dir else set())
            known[folder] |= {path.stem for place in of_images for path in _images_in(place)}
    problems = []
    for folder, place in spelt.items():
        extra = [path.name for path in _images_in(place) if path.stem not in known[folder]]
        if extra:
            problems.append(
                f"conditioning_data_dir {place}: no image has the name of {_some(extra)}; rename or remove what "
                "belongs to no image"
            )
    if problems:
        raise UserError("\n".join(problems))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
