"""The dataset file: the data of a run, checked in full before anything is loaded.

A key may be in a subset, a dataset, ``[general]``, or on the command line; the innermost wins. All mistakes
of a file are reported at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

from library.config.arguments import DatasetOptions, ValidationOptions
from library.config.dataset_keys import (
    CHECKS,
    DATASET,
    FROM_COMMAND_LINE,
    GENERAL,
    KEYS,
    NEEDS_CAPTION_VARIANTS,
    NOT_WITH_CACHED_LATENTS,
    NOT_WITH_METADATA,
    OPTIONS_ONLY,
    OTHER_NAMES,
    SUBSET,
    number_range,
    parse_size,
)
from library.config.mistakes import home_hint
from library.config.toml_file import load_toml
from library.data.buckets import MAX_SIDE, MAX_SIZES, BucketRules, make_sizes, size_count
from library.data.captions import CaptionRules
from library.data.dataset_spec import DatasetConfig, DatasetSpec, SubsetSpec
from library.data.effects import Place, Unused
from library.data.image_io import EXTENSIONS, is_image_name
from library.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


def load_dataset_config(
    path: Path | str | None, options: DatasetOptions, validation: ValidationOptions | None = None
) -> DatasetConfig:
    """Read and check the dataset file, or the folders that the command line names.

    Args:
        options: values for keys that the file does not give.
        validation: the same, of validation.

    Raises:
        UserError: every mistake, one line each, with file, table, key and remedy.
    """
    if path is None:
        return _Reader("command line", options, validation).read(_from_folders(options))
    path = Path(path)
    if path.suffix.lower() not in (".toml", ".json"):
        raise UserError(f"--dataset_config {path}: must end with .toml or .json")
    content = load_json(path) if path.suffix.lower() == ".json" else load_toml(path)
    return _Reader(str(path), options, validation).read(content)


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _from_folders(options: DatasetOptions) -> dict[str, Any]:
    """``--train_data_dir`` and ``--reg_data_dir``: sub-folders named ``<repeats>_<class tokens>``.

    With ``--in_json``, a metadata file, ``--train_data_dir`` is the folder of the images themselves; with
    ``--conditioning_data_dir`` it may hold them itself.
    """
    if options.in_json:
        subset = {"metadata_file": options.in_json}
        if options.train_data_dir:
            subset["image_dir"] = options.train_data_dir
        return {"datasets": [{"subsets": [subset]}]}
    subsets: list[dict[str, Any]] = []
    for flag, folder, is_reg in (
        ("--train_data_dir", options.train_data_dir, False),
        ("--reg_data_dir", options.reg_data_dir, True),
    ):
        if not folder:
            continue
        if problem := _folder_problem(folder):
            raise UserError(f"{flag} {folder}: {problem}")
        if options.conditioning_data_dir and not is_reg and any(_has_images(Path(folder))):
            subsets.append({"image_dir": folder, "num_repeats": 1})
            continue
        found = []
        for inner in sorted(p for p in Path(folder).iterdir() if p.is_dir()):
            named = re.fullmatch(r"(\d+)_(.*)", inner.name)
            if named is None or int(named.group(1)) < 1:
                logger.warning("%s %s: left out, as it is not named <repeats>_<class tokens>", flag, inner)
                continue
            repeats, tokens = int(named.group(1)), named.group(2).strip()
            if tokens != os.fsencode(tokens).decode("utf-8", "replace"):
                raise UserError(f"{flag} {inner}: the name is a caption, but not in UTF-8; rename the folder")
            found.append({"image_dir": str(inner), "num_repeats": repeats, "class_tokens": tokens, "is_reg": is_reg})
        if not found:
            raise UserError(
                f"{flag} {folder}: has no folder named <repeats>_<class tokens>, such as '10_sks cat'; name the parent "
                "of the image folders"
            )
        subsets += found
    return {"datasets": [{"subsets": subsets}]}


class _Reader:
    """Turns one file's tables into specs and collects every mistake."""

    def __init__(self, source: str, options: DatasetOptions, validation: ValidationOptions | None) -> None:
        self._source = source
        self._options = options
        self._validation = validation or ValidationOptions()
        self._problems: list[str] = []
        self._unused = Unused()
        self._command_line = self._from_command_line()

    def _from_command_line(self) -> dict[str, Any]:
        """Return values of options for keys, by key; ``None`` counts as not given."""
        found = {}
        for name, key in KEYS.items():
            flag = key.flag
            if name == "caption_extension" and self._options.caption_extention:
                flag = "caption_extention"
            holder = self._validation if flag and hasattr(self._validation, flag) else self._options
            value = getattr(holder, flag) if flag else None
            if value is None:
                continue
            parse = FROM_COMMAND_LINE.get(key.kind)
            is_good = parse(value) is not None if parse else CHECKS[key.kind][0](value)
            if is_good:
                found[name] = value
            else:
                wanted = CHECKS[key.kind][1].replace("in quotes, ", "").replace("[width, height]", "width,height")
                self._problems.append(f"--{flag} {value}: write {wanted}")
        return found

    def read(self, content: Any) -> DatasetConfig:
        if not isinstance(content, Mapping):
            raise UserError(f"{self._source}: must hold the tables [general] and [[datasets]]")
        for key in content:
            if key not in ("general", "datasets"):
                hint = did_you_mean(key, ["general", "datasets"])
                inside = f"; put it into {KEYS[key].levels[0]}" if key in KEYS else ""
                self._problem("top level", key, f"unknown key{hint}{inside}")
        general = self._table(content.get("general", {}), GENERAL, GENERAL)
        datasets = []
        tables = content.get("datasets", [])
        if not isinstance(tables, list) or not tables:
            self._problem("top level", "datasets", "there must be at least one [[datasets]] table")
            tables = []
        for index, table in enumerate(tables, start=1):
            datasets.append(self._dataset(table, general, f"[[datasets]] {index}"))
        if datasets and not any(dataset is None or dataset.is_dreambooth for dataset in datasets):
            for key in (name for name in NOT_WITH_METADATA if general.get(name)):
                logger.warning("%s: [general]: %s: has no effect on images of metadata files", self._source, key)
        if self._problems:
            raise UserError("\n".join(self._problems))
        for warning in self._unused.warnings():
            logger.warning(warning)
        return DatasetConfig(self._source, tuple(d for d in datasets if d is not None))

    def _problem(self, where: str, key: str, text: str) -> None:
        self._problems.append(f"{self._source}: {where}: {key}: {text}")

    def _table(self, table: Any, level: str, where: str) -> dict[str, Any]:
        """Return the values of one table that have the right kind and level."""
        if not isinstance(table, Mapping):
            self._problem(where, level, "must be a table")
            return {}
        good = {}
        for name, value in table.items():
            if name == "subsets" and level == DATASET:
                continue
            published = str(OTHER_NAMES.get(name, name))
            key = KEYS.get(published)
            if name != published and published in table:
                self._problem(where, name, f"means the same as {published}; write one of them")
            elif name in OPTIONS_ONLY:
                self._problem(where, name, f"belongs on the command line: --{name}")
            elif key is None:
                self._problem(where, name, f"unknown key{did_you_mean(name, [*KEYS, *OTHER_NAMES])}")
            elif level not in key.levels:
                self._problem(where, name, f"belongs into {' or '.join(key.levels)}")
            elif not CHECKS[key.kind][0](value):
                self._problem(where, name, f"{_as_written(value)}: write {CHECKS[key.kind][1]}")
            else:
                good[published] = value
        return good

    def _lookup(self, *tables: Mapping[str, Any]) -> dict[str, Any]:
        """Return every key's value: the innermost table's, else the command line's, else the default."""
        values = {name: key.default for name, key in KEYS.items()}
        for table in (self._command_line, *reversed(tables)):
            values.update(table)
        return values

    def _dataset(self, table: Any, general: Mapping[str, Any], where: str) -> DatasetSpec | None:
        own = self._table(table, DATASET, where)
        values = self._lookup(own, general)
        resolution = parse_size(values["resolution"])
        if resolution is None:
            if self._options.resolution is None and "resolution" not in (table if isinstance(table, Mapping) else {}):
                self._problem(where, "resolution", "is missing: give it here or as --resolution, such as 512")
        rules = BucketRules(
            resolution=resolution or (0, 0),
            enabled=values["enable_bucket"],
            min_side=values["min_bucket_reso"],
            max_side=values["max_bucket_reso"],
            step=values["bucket_reso_steps"],
            no_upscale=values["bucket_no_upscale"],
        )
        if resolution and max(resolution) > MAX_SIDE:
            self._problem(where, "resolution", f"{max(resolution)}: at most {MAX_SIDE} pixels")
        elif resolution and rules.enabled and not rules.no_upscale:
            self._check_sides(rules, where)
        subsets = table.get("subsets", []) if isinstance(table, Mapping) else []
        if not isinstance(subsets, list) or not subsets:
            self._problem(where, "subsets", "there must be at least one [[datasets.subsets]] table")
            subsets = []
        with_metadata = [isinstance(subset, Mapping) and "metadata_file" in subset for subset in subsets]
        if any(with_metadata) and not all(with_metadata):
            self._problem(
                where,
                "metadata_file",
                "some subsets have one and others not; put them into [[datasets]] tables of their own",
            )
        elif any(with_metadata):
            self._refuse_with_metadata(own, where)
        specs = [
            self._subset(subset, own, general, f"{where} > [[datasets.subsets]] {index}")
            for index, subset in enumerate(subsets, start=1)
        ]
        if not self._problems and any(specs) and all(spec is None or spec.is_reg for spec in specs):
            self._problem(where, "is_reg", "all subsets are regularization images; there is nothing to train on")
        if subsets and not self._problems and all(spec is None for spec in specs):
            self._problem(where, "num_repeats", "is 0 for every subset; nothing is left to train on")
        return DatasetSpec(
            buckets=rules,
            batch_size=values["batch_size"],
            network_multiplier=float(values["network_multiplier"]),
            resize_interpolation=values["resize_interpolation"],
            subsets=tuple(spec for spec in specs if spec is not None),
            validation_seed=values["validation_seed"],
        )

    def _refuse_with_metadata(self, own: Mapping[str, Any], where: str) -> None:
        for key in (name for name in NOT_WITH_METADATA if own.get(name)):
            self._problem(where, key, "only for images with caption files, not with metadata_file; remove it")

    def _check_sides(self, rules: BucketRules, where: str) -> None:
        resolution = rules.resolution
        if not rules.min_side <= min(resolution) <= max(resolution) <= rules.max_side:
            self._problem(
                where,
                "min_bucket_reso, max_bucket_reso",
                f"{rules.min_side} to {rules.max_side}: must hold the resolution {resolution[0]}x{resolution[1]}",
            )
        elif (count := size_count(rules)) > MAX_SIZES:
            self._problem(
                where,
                "bucket_reso_steps",
                f"{rules.step}: would make about {count:,} bucket sizes; raise it, or min_bucket_reso",
            )
        elif not make_sizes(rules):
            self._problem(
                where,
                "bucket_reso_steps",
                f"{rules.step}: no multiple from {rules.min_side} to {rules.max_side} fits the resolution; lower it",
            )
        elif (rules.sides[0], rules.sides[-1]) != (rules.min_side, rules.max_side):
            logger.warning(
                "%s: %s: min_bucket_reso %d, max_bucket_reso %d: taken as %d and %d, multiples of bucket_reso_steps",
                *(self._source, where, rules.min_side, rules.max_side, rules.sides[0], rules.sides[-1]),
            )

    def _subset(
        self, table: Any, dataset: Mapping[str, Any], general: Mapping[str, Any], where: str
    ) -> SubsetSpec | None:
        own = self._table(table, SUBSET, where)
        values = self._lookup(own, dataset, general)
        folder, metadata = values["image_dir"], values["metadata_file"]
        if metadata is not None:
            self._refuse_with_metadata(own, where)
        if not self._places_are_good(folder, metadata, table, where):
            return None
        if self._options.cache_latents or self._options.cache_latents_to_disk:
            for name in NOT_WITH_CACHED_LATENTS:
                if values[name]:
                    self._problem(where, name, "not with cached latents, which are made once; remove one of them")
        self._check_cached_texts(values, where)
        conditioning = values["conditioning_data_dir"] or None
        if values["is_reg"] and "conditioning_data_dir" not in own:
            conditioning = None  # the command line's folder is that of the training images
        if conditioning and (problem := _folder_problem(conditioning)):
            self._problem(where, "conditioning_data_dir", f"{conditioning}: {problem}")
            return None
        if values["num_repeats"] < 1:
            logger.warning("%s: %s: left out, as num_repeats is %d", self._source, where, values["num_repeats"])
            return None
        if values["is_reg"] and own.get("validation_split"):
            logger.warning(
                "%s: %s: validation_split has no effect: regularization images are never validated on",
                *(self._source, where),
            )
        if not self._problems:  # otherwise values may be missing
            tables = ((where, own), (where.rsplit(" > ")[0], dataset), (GENERAL, general))
            seed = dataset.get("validation_seed", general.get("validation_seed"))  # no subset has its own
            self._unused.note(
                values | {"validation_seed": seed},
                [Place(f"{self._source}: {name}", table) for name, table in tables],
            )
        extension = values["caption_extension"]
        return SubsetSpec(
            where=f"{self._source}: {where}",
            image_dir=Path(folder) if folder else None,
            num_repeats=values["num_repeats"],
            is_reg=values["is_reg"],
            class_tokens=values["class_tokens"],
            caption_extension=extension if extension.startswith(".") or not extension else f".{extension}",
            captions=_caption_rules(values),
            flip_aug=values["flip_aug"],
            random_crop=values["random_crop"],
            face_crop_range=number_range(values["face_crop_aug_range"]),
            color_aug=values["color_aug"],
            alpha_mask=values["alpha_mask"],
            conditioning_dir=Path(conditioning) if conditioning else None,
            resize_interpolation=values["resize_interpolation"],
            custom_attributes=values["custom_attributes"] or {},
            metadata_file=Path(metadata) if metadata else None,
            cache_info=values["cache_info"],
            on_bad_image=self._options.on_bad_image,
            validation_split=0.0 if values["is_reg"] else float(values["validation_split"]),
        )

    def _check_cached_texts(self, values: Mapping[str, Any], where: str) -> None:
        """Refuse captions that cannot be encoded once; dropping whole captions always works."""
        options = self._options
        if not (options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk):
            return
        flag = "--cache_text_encoder_outputs" + ("_to_disk" if options.cache_text_encoder_outputs_to_disk else "")
        if options.text_encoder_cache_variants < 2:
            for name in NEEDS_CAPTION_VARIANTS:
                if values[name]:
                    self._problem(
                        where,
                        name,
                        f"with {flag}, each image has one caption for the whole run; add "
                        "--text_encoder_cache_variants 8 for eight of them, or remove one of the two",
                    )
        if values["token_warmup_step"]:
            self._problem(
                where, "token_warmup_step", f"not with {flag}, as captions grow with the step; remove one of them"
            )

    def _places_are_good(self, folder: str | None, metadata: str | None, table: Any, where: str) -> bool:
        """Whether folder and metadata file of a subset exist."""
        before = len(self._problems)
        if metadata is not None:
            if Path(metadata).suffix.lower() not in (".json", ".jsonl"):
                self._problem(where, "metadata_file", f"{metadata}: must end with .json or .jsonl")
            elif not Path(metadata).is_file():
                self._problem(where, "metadata_file", f"{metadata}: no such file{home_hint(metadata)}")
            if folder and (problem := _folder_problem(folder)):
                self._problem(where, "image_dir", f"{folder}: {problem}")
        elif not folder:
            if folder == "" or isinstance(table, Mapping) and not {"image_dir", "metadata_file"} & set(table):
                self._problem(where, "image_dir", "is missing: name the folder with the images")
            return False
        elif problem := _folder_problem(folder):
            self._problem(where, "image_dir", f"{folder}: {problem}")
        elif not any(_has_images(Path(folder))):
            self._problem(where, "image_dir", f"{folder}: holds no images ({', '.join(EXTENSIONS)}){_inside(folder)}")
        return len(self._problems) == before


def _caption_rules(values: Mapping[str, Any]) -> CaptionRules:
    return CaptionRules(
        prefix=values["caption_prefix"],
        suffix=values["caption_suffix"],
        separator=values["caption_separator"],
        secondary_separator=values["secondary_separator"],
        shuffle=values["shuffle_caption"],
        keep_tokens=values["keep_tokens"],
        keep_tokens_separator=values["keep_tokens_separator"],
        wildcards=values["enable_wildcard"],
        dropout_rate=values["caption_dropout_rate"],
        dropout_every_n_epochs=values["caption_dropout_every_n_epochs"],
        tag_dropout_rate=values["caption_tag_dropout_rate"],
        warmup_min=values["token_warmup_min"],
        warmup_step=values["token_warmup_step"],
    )


def _folder_problem(folder: str) -> str | None:
    """Return why a folder cannot be searched for images; ``None`` if it can."""
    if not os.path.isdir(folder):
        return f"no such folder{home_hint(folder)}"
    # a folder that may be listed but not entered gives only names
    return None if os.access(folder, os.R_OK | os.X_OK) else "may not be read (permission denied)"


def _has_images(folder: Path) -> Iterator[bool]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image_name(entry.name) and not _is_folder(entry):
                yield True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself; reading it reports what is wrong
        return False


def _inside(folder: str) -> str:
    """Return a hint if the images are one level deeper, where they are not searched."""
    inner = sorted(path for path in Path(folder).iterdir() if path.is_dir() and os.access(path, os.R_OK | os.X_OK))
    found = next((path.name for path in inner if any(_has_images(path))), None)
    return f"; folders inside are not searched: name each in a subset of its own, such as {found}" if found else ""


def _as_written(value: Any) -> str:
    """Return a value much as the file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (date, time)) else repr(value)  # a datetime is a date
