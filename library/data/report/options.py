"""The options of ``tools/check_dataset.py``: its own, and all of ``train_network.py``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

from library.architectures.tool_families import cache_options, family_switches
from library.config.arguments import DatasetOptions, ModelOptions, RunOptions, TrainingOptions, build_parser, flat
from library.config.fields import option
from library.config.help import split_doc
from library.data.report.near_duplicates import DISTANCE
from library.errors import UserError


@dataclass(frozen=True)
class CheckOptions:
    """Report."""

    html: Path | None = option(None, "write the report as one HTML file with small images in it", type=Path)
    json: Path | None = option(None, "write everything that was found as JSON, for scripts", type=Path)
    tokenizer: Path | None = option(
        None,
        "folder with a tokenizer's files (vocab.json and merges.txt, or tokenizer.json), to find captions that are "
        "cut; not needed with --pretrained_model_name_or_path",
        type=Path,
    )
    hash_distance: int = option(
        DISTANCE,
        "images look alike if at most so many of the 128 bits of their fingerprints differ; 0 to 32",
        type=int,
    )
    max_thumbnails: int = option(200, "small images in the HTML file at most; each takes about 6 kB", type=int)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> CheckOptions:
        """Raises UserError: values that cannot work."""
        found = cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})
        if not 0 <= found.hash_distance <= 32:
            raise UserError(f"--hash_distance {found.hash_distance}: must be between 0 and 32")
        if found.max_thumbnails < 0:
            raise UserError(f"--max_thumbnails {found.max_thumbnails}: must be at least 0")
        for flag, path in (("html", found.html), ("json", found.json)):
            if path is not None and path.is_dir():
                raise UserError(f"--{flag} {path}: a folder; name a file")
            if path is not None and not path.absolute().parent.is_dir():
                raise UserError(f"--{flag} {path}: there is no folder {path.parent}; make it first")
        return found


#: which family the data are for, whose buckets and captions are its own
FamilyOptions = make_dataclass(
    "FamilyOptions", family_switches("the data are for"), namespace={"__doc__": "Model family."}, frozen=True
)

#: data options that do not change the training data
_NOT_LOOKED_AT = (
    "dataset_class", "vae_batch_size", "skip_cache_check", "debug_dataset", "max_data_loader_n_workers",
    "persistent_data_loader_workers", "on_bad_image", "clip_skip", "no_half_vae", "text_encoder_batch_size",
)  # fmt: skip
#: options of other groups that matter here
_ALSO_LOOKED_AT = (
    "gradient_accumulation_steps", "max_train_steps", "max_train_epochs", "validation_split", "validation_seed",
    "seed", "strict", "console_log_level", "console_log_file", "console_log_simple", "config_file", "output_config",
)  # fmt: skip


def _is_looked_at(name: str) -> bool:
    of_data = {field.name for group in (ModelOptions, DatasetOptions) for field in fields(group)}
    return (
        name in _ALSO_LOOKED_AT or name in cache_options(text=True) or (name in of_data and name not in _NOT_LOOKED_AT)
    )


def parser(doc: str | None, training: type[RunOptions]) -> argparse.ArgumentParser:
    """Return a parser that takes every option of training, so that a training command can be checked as it is.

    Args:
        training: the class of all options of training.
    """
    summary, example, more = split_doc(doc)
    groups = {"report": CheckOptions, "for": FamilyOptions, **training.groups()}
    made = build_parser(groups, description=summary, epilog=example, more=more)
    own = {field.name for group in (CheckOptions, FamilyOptions) for field in fields(group)} | {"help"}
    for action in made._actions:
        if action.dest == "strict":
            action.help = "end with code 1 for warnings too, not only for errors"
        if action.dest not in own and not _is_looked_at(action.dest):
            action.help = argparse.SUPPRESS
    return made


def about_data(options: RunOptions) -> RunOptions:
    """Return the options with everything irrelevant reset to defaults."""
    training = replace(
        TrainingOptions(),
        gradient_accumulation_steps=options.training.gradient_accumulation_steps,
        max_train_steps=options.training.max_train_steps,
        max_train_epochs=options.training.max_train_epochs,
        seed=options.training.seed,
    )
    dropped: dict[str, Any] = {f.name: f.default for f in fields(options.dataset) if f.name in _NOT_LOOKED_AT}
    plain = RunOptions.from_args(argparse.Namespace())
    return replace(
        plain,
        model=options.model,
        dataset=replace(options.dataset, **dropped),
        training=training,
        validation=options.validation,
        console=options.console,
    )


def not_looked_at(options: RunOptions) -> list[str]:
    """Return the given flags that do not matter here."""
    return [f"--{f.name}" for f, value in flat(options) if value != f.default and not _is_looked_at(f.name)]
