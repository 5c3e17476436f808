"""Options of sample images, validation, logs and metadata."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from library.config.declaration import Declaration, Facts, Finding, idle
from library.config.fields import option
from library.config.paths import no_file


@dataclass(frozen=True)
class SampleOptions:
    """Sample images while training."""

    harmless: ClassVar[bool] = True

    sample_prompts: str | None = option(None, "file of prompts: .txt with one a line, .toml or .json")
    sample_every_n_steps: int | None = option(
        None, "generate sample images after every n-th step", type=int, neutral=(0,), unit="steps"
    )
    sample_every_n_epochs: int | None = option(
        None,
        "generate sample images after every n-th epoch; wins over steps",
        type=int,
        neutral=(0,),
        unit="epochs",
    )
    sample_at_first: bool = option(False, "generate sample images before the first step too")
    sample_sampler: str = option(
        "ddim",
        "sampler",
        choices=[
            "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
            "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
        ],
    )  # fmt: skip

    @property
    def steps_between(self) -> int | None:
        """Return the interval in steps; ``None`` if it is off, which programs write as 0 or below."""
        return _if_positive(self.sample_every_n_steps)

    @property
    def epochs_between(self) -> int | None:
        return _if_positive(self.sample_every_n_epochs)

    @property
    def is_asked_for(self) -> bool:
        """Whether sample images are requested at some time, with or without prompts."""
        return bool(self.steps_between or self.epochs_between or self.sample_at_first)


def _if_positive(number: int | None) -> int | None:
    return number if number is not None and number > 0 else None


@dataclass(frozen=True)
class ValidationOptions:
    """Validation."""

    harmless: ClassVar[bool] = True

    validation_split: float = option(
        0.0,
        "fraction of held-out images, 0 to 1, unless the dataset file sets it",
        type=float,
        unit="share, 0 to 1",
    )
    validation_seed: int | None = option(
        None,
        "seed of the choice of held-out images and of the noise of validation (as --seed, if not given)",
        type=int,
        unit="",
    )
    validate_every_n_steps: int | None = option(
        None, "validate after every n-th step too", type=int, neutral=(0,), unit="steps", minimum=1
    )
    validate_every_n_epochs: int | None = option(
        None,
        "validate after every n-th epoch (after each, if not given)",
        type=int,
        unit="epochs",
        minimum=1,
    )
    max_validation_steps: int | None = option(
        None,
        "most batches of a validation, over all processes; always the same ones",
        type=int,
        unit="batches",
        minimum=1,
    )
    early_stopping_patience: int | None = option(
        None,
        "early stopping: end the run after this many validations in a row without a new lowest loss",
        type=int,
        unit="validations",
        minimum=1,
    )
    save_best: bool = option(False, "keep the weights of the lowest validation loss so far in <output_name>-best")


@dataclass(frozen=True)
class LoggingOptions:
    """Logs."""

    harmless: ClassVar[bool] = True

    logging_dir: str | None = option(None, "folder of TensorBoard logs (<output_dir>/logs, if not given)")
    log_with: str | None = option(
        None,
        "where metrics go; TensorBoard is always on",
        choices=["tensorboard", "wandb", "all"],
        neutral=("tensorboard",),
    )
    log_prefix: str | None = option(None, "text before the name of the run's folder")
    log_tracker_name: str | None = option(None, "name of the project in the tracker (network_train, if not given)")
    wandb_run_name: str | None = option(None, "name of the run in wandb")
    log_tracker_config: str | None = option(None, "TOML file of settings for the trackers, a table for each")
    wandb_api_key: str | None = option(None, "wandb key; never recorded", secret=True)
    log_config: bool = option(False, "record the run's options in the trackers, without secrets and folders")


@dataclass(frozen=True)
class ModelSpecOptions:
    """Metadata of the saved file."""

    harmless: ClassVar[bool] = True

    metadata_title: str | None = option(None, "title (the output's name, if not given)")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "license")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use it")
    metadata_thumbnail: str | None = option(None, "image: a file or a data URL")
    metadata_merged_from: str | None = option(None, "models it was merged from")
    metadata_trigger_phrase: str | None = option(None, "trigger words")
    metadata_preprocessor: str | None = option(None, "preprocessor it needs")
    metadata_is_negative_embedding: str | None = option(None, "whether it is a negative embedding")


# ---- what cannot work ----


def files(o: Any, facts: Facts) -> Iterator[Finding]:
    yield from no_file("sample_prompts", o.sample.sample_prompts)
    yield from no_file("log_tracker_config", o.logging.log_tracker_config)
    thumbnail = o.modelspec.metadata_thumbnail
    if thumbnail and not thumbnail.startswith("data:"):
        yield from no_file("metadata_thumbnail", thumbnail)


# ---- what has no effect ----


@idle("sample_every_n_steps", reason="at 0 or below, which is off; leave it out")
def samples_by_steps_are_off(o: Any) -> bool:
    return o.sample.steps_between is None


@idle("sample_every_n_epochs", reason="at 0 or below, which is off; leave it out")
def samples_by_epochs_are_off(o: Any) -> bool:
    return o.sample.epochs_between is None


@idle("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first", reason="without --sample_prompts, a file")
def no_prompts(o: Any) -> bool:
    return not o.sample.sample_prompts


@idle(
    "sample_prompts",
    reason="without --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first",
)
def prompts_are_never_drawn(o: Any) -> bool:
    return not o.sample.is_asked_for


@idle("sample_every_n_steps", reason="beside --sample_every_n_epochs, which wins")
def epochs_of_samples_win(o: Any) -> bool:
    return o.sample.epochs_between is not None


@idle("sample_sampler", reason="without sample images")
def nothing_is_drawn(o: Any) -> bool:
    return not (o.sample.sample_prompts and o.sample.is_asked_for)


@idle("wandb_run_name", "wandb_api_key", reason="without --log_with wandb")
def no_wandb(o: Any) -> bool:
    return o.logging.log_with not in ("wandb", "all")


DECLARATION = Declaration(
    groups={
        "sample": SampleOptions,
        "validation": ValidationOptions,
        "logging": LoggingOptions,
        "modelspec": ModelSpecOptions,
    },
    rules=(files,),
    idle=(
        samples_by_steps_are_off,
        samples_by_epochs_are_off,
        no_prompts,
        prompts_are_never_drawn,
        epochs_of_samples_win,
        nothing_is_drawn,
        no_wandb,
    ),
)
