"""Options of output and of resuming."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from library.config.declaration import Declaration, Facts, Finding, error, idle, warning
from library.config.fields import option
from library.config.mistakes import home_hint
from library.config.paths import no_folder
from library.files.hub import REPO_TYPES


@dataclass(frozen=True)
class OutputOptions:
    """Output."""

    harmless: ClassVar[bool] = True

    output_dir: str | None = option(None, "folder for weights, states, samples and logs")
    output_name: str | None = option(None, "name of the files, without extension (last, if not given)")
    save_model_as: str | None = option(
        "safetensors", "format of the weights", choices=[None, "ckpt", "pt", "safetensors"]
    )
    save_precision: str | None = option(
        None,
        "precision of saved weights (float, or that of --full_fp16 or --full_bf16, if not given)",
        choices=[None, "float", "fp16", "bf16"],
    )
    save_every_n_epochs: int | None = option(
        None, "save after every n-th epoch", type=int, neutral=(0,), unit="epochs", minimum=1
    )
    save_every_n_steps: int | None = option(
        None, "save after every n-th step", type=int, neutral=(0,), unit="steps", minimum=1
    )
    save_n_epoch_ratio: int | None = option(
        None,
        "save at least n times over the run",
        type=int,
        neutral=(0,),
        unit="saves a run",
        minimum=1,
    )
    save_last_n_epochs: int | None = option(
        None, "keep only the last n of the epochs' saves", type=int, neutral=(0,), unit="epochs", minimum=1
    )
    save_last_n_epochs_state: int | None = option(
        None,
        "the same for states (as --save_last_n_epochs, if not given)",
        type=int,
        neutral=(0,),
        unit="epochs",
        minimum=1,
    )
    save_last_n_steps: int | None = option(
        None, "keep only saves of the last n steps", type=int, neutral=(0,), unit="steps", minimum=1
    )
    save_last_n_steps_state: int | None = option(
        None,
        "the same for states (as --save_last_n_steps, if not given)",
        type=int,
        neutral=(0,),
        unit="steps",
        minimum=1,
    )
    save_state: bool = option(False, "save the training state with the weights, for --resume")
    save_state_on_train_end: bool = option(False, "save the state at the end only")
    no_metadata: bool = option(False, "write no more metadata than other programs need")
    training_comment: str | None = option(None, "text to record in the metadata")
    huggingface_repo_id: str | None = option(None, "upload saves to this Hub repository, name/model")
    huggingface_repo_type: str | None = option(None, "its type, e.g. model")
    huggingface_path_in_repo: str | None = option(None, "folder in it")
    huggingface_token: str | None = option(None, "Hub access token; never recorded", secret=True)
    huggingface_repo_visibility: str | None = option(None, "public, or private (the default of a new one)")
    save_state_to_huggingface: bool = option(False, "upload states too")
    async_upload: bool = option(False, "upload while training continues")

    @property
    def folder(self) -> Path:
        """Return the folder of the results, which ``needs_output`` requires."""
        assert self.output_dir
        return Path(self.output_dir)


@dataclass(frozen=True)
class ResumeOptions:
    """Resuming an earlier run."""

    harmless: ClassVar[bool] = True

    resume: str | None = option(None, "state folder to resume from, exactly where it stopped")
    resume_from_huggingface: bool = option(False, "take the state from the Hub: repo/path:revision:type")
    skip_until_initial_step: bool = option(False, "skip the data before the initial step")
    initial_epoch: int | None = option(
        None, "epoch to start at, counted from 1", type=int, neutral=(0, 1), unit="epoch, from 1", minimum=1
    )
    initial_step: int | None = option(
        None,
        "step to start at, counted from 0; wins over --initial_epoch",
        type=int,
        neutral=(0,),
        unit="step, from 0",
        minimum=0,
    )


# ---- what cannot work ----


def needs_output(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.output.output_dir:
        yield error("--output_dir: name the folder for the results")
    folders = {"output_dir": o.output.output_dir, "logging_dir": o.logging.logging_dir}
    for flag, folder in ((flag, Path(given)) for flag, given in folders.items() if given):
        # the folder itself, or its nearest existing parent
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not existing.is_dir():
            yield error(f"--{flag} {folder}: {existing} is a file, not a folder")
        elif not os.access(existing, os.W_OK):
            yield error(f"--{flag} {folder}: {existing} may not be written to; name another folder")
        if hint := home_hint(folder):
            yield error(f"--{flag} {folder}{hint}")
    name = o.output.output_name
    if name and Path(name).name != name:
        yield error(f"--output_name {name}: a name without folders; put the folder into --output_dir")
    elif name and Path(name).suffix in (".safetensors", ".ckpt", ".pt"):
        yield warning(f"--output_name {name}: the extension is added automatically; leave {Path(name).suffix} out")


def hub(o: Any, facts: Facts) -> Iterator[Finding]:
    kind, visibility = o.output.huggingface_repo_type, o.output.huggingface_repo_visibility
    if kind not in (None, *REPO_TYPES):
        yield error(f"--huggingface_repo_type {kind}: files go into one of type {' or '.join(REPO_TYPES)}")
    if visibility not in (None, "public", "private"):
        yield warning(f"--huggingface_repo_visibility {visibility}: taken as private; write public or private")


def state_folder(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.resume.resume_from_huggingface:  # then it is not a path
        yield from no_folder("resume", o.resume.resume)


# ---- what has no effect ----


@idle("save_every_n_epochs", reason="beside --save_n_epoch_ratio, which wins")
def ratio_wins(o: Any) -> bool:
    return o.output.save_n_epoch_ratio is not None


@idle(
    "save_last_n_epochs",
    "save_last_n_epochs_state",
    reason="without --save_every_n_epochs or --save_n_epoch_ratio",
)
def no_saves_of_epochs(o: Any) -> bool:
    return not (o.output.save_every_n_epochs or o.output.save_n_epoch_ratio)


@idle("save_last_n_steps", "save_last_n_steps_state", reason="without --save_every_n_steps")
def no_saves_of_steps(o: Any) -> bool:
    return not o.output.save_every_n_steps


@idle("save_last_n_epochs_state", "save_last_n_steps_state", reason="without --save_state")
def no_states_on_the_way(o: Any) -> bool:
    return not o.output.save_state


@idle("save_state_on_train_end", reason="beside --save_state, which saves the state at the end too")
def state_is_saved_anyway(o: Any) -> bool:
    return o.output.save_state


@idle(
    "no_metadata",
    "training_comment",
    "metadata_title",
    "metadata_author",
    "metadata_description",
    "metadata_license",
    "metadata_tags",
    "metadata_usage_hint",
    "metadata_thumbnail",
    "metadata_merged_from",
    "metadata_trigger_phrase",
    "metadata_preprocessor",
    "metadata_is_negative_embedding",
    reason="with --save_model_as ckpt or pt, which hold no metadata",
)
def format_without_metadata(o: Any) -> bool:
    return o.output.save_model_as in ("ckpt", "pt")


@idle("training_comment", reason="with --no_metadata")
def comments_are_left_out(o: Any) -> bool:
    return o.output.no_metadata


@idle(
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
    "async_upload",
    reason="without --huggingface_repo_id",
)
def nothing_is_uploaded(o: Any) -> bool:
    return not o.output.huggingface_repo_id


@idle("huggingface_token", reason="without --huggingface_repo_id or --resume_from_huggingface")
def the_hub_is_not_asked(o: Any) -> bool:
    return not (o.output.huggingface_repo_id or o.resume.resume_from_huggingface)


@idle("save_state_to_huggingface", reason="without --save_state or --save_state_on_train_end")
def no_state_to_upload(o: Any) -> bool:
    return not (o.output.save_state or o.output.save_state_on_train_end)


@idle("resume_from_huggingface", reason="without --resume, which names the state")
def no_state_is_named(o: Any) -> bool:
    return not o.resume.resume


@idle("initial_epoch", reason="beside --initial_step, which wins")
def initial_step_wins(o: Any) -> bool:
    return o.resume.initial_step is not None


@idle(
    "skip_until_initial_step",
    reason="without --initial_step; --initial_epoch starts at the beginning of an epoch's data",
)
def starts_with_an_epoch(o: Any) -> bool:
    return not o.resume.initial_step


@idle(
    "initial_epoch",
    "initial_step",
    "skip_until_initial_step",
    reason="beside --resume, whose state has the position of the run",
)
def the_state_says_where(o: Any) -> bool:
    return o.resume.resume is not None


DECLARATION = Declaration(
    groups={"output": OutputOptions, "resume": ResumeOptions},
    rules=(needs_output, state_folder, hub),
    idle=(
        ratio_wins,
        no_saves_of_epochs,
        no_saves_of_steps,
        no_states_on_the_way,
        state_is_saved_anyway,
        format_without_metadata,
        comments_are_left_out,
        nothing_is_uploaded,
        the_hub_is_not_asked,
        no_state_to_upload,
        no_state_is_named,
        initial_step_wins,
        starts_with_an_epoch,
        the_state_says_where,
    ),
)
