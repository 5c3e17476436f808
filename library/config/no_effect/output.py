"""Options without effect on what is saved and uploaded, and on what a run goes on from."""

from __future__ import annotations

from library.config.arguments import TrainNetworkOptions
from library.config.no_effect.declare import idle

# ---- saving ----


@idle("save_every_n_epochs", reason="beside --save_n_epoch_ratio, which wins")
def ratio_wins(o: TrainNetworkOptions) -> bool:
    return o.output.save_n_epoch_ratio is not None


@idle(
    "save_last_n_epochs",
    "save_last_n_epochs_state",
    reason="without --save_every_n_epochs or --save_n_epoch_ratio",
)
def no_saves_of_epochs(o: TrainNetworkOptions) -> bool:
    return not (o.output.save_every_n_epochs or o.output.save_n_epoch_ratio)


@idle("save_last_n_steps", "save_last_n_steps_state", reason="without --save_every_n_steps")
def no_saves_of_steps(o: TrainNetworkOptions) -> bool:
    return not o.output.save_every_n_steps


@idle("save_last_n_epochs_state", "save_last_n_steps_state", reason="without --save_state")
def no_states_on_the_way(o: TrainNetworkOptions) -> bool:
    return not o.output.save_state


@idle("save_state_on_train_end", reason="beside --save_state, which saves the state at the end too")
def state_is_saved_anyway(o: TrainNetworkOptions) -> bool:
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
def format_without_metadata(o: TrainNetworkOptions) -> bool:
    return o.output.save_model_as in ("ckpt", "pt")


@idle("training_comment", reason="with --no_metadata")
def comments_are_left_out(o: TrainNetworkOptions) -> bool:
    return o.output.no_metadata


# ---- the Hub ----


@idle(
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
    "async_upload",
    reason="without --huggingface_repo_id",
)
def nothing_is_uploaded(o: TrainNetworkOptions) -> bool:
    return not o.output.huggingface_repo_id


@idle("huggingface_token", reason="without --huggingface_repo_id or --resume_from_huggingface")
def the_hub_is_not_asked(o: TrainNetworkOptions) -> bool:
    return not (o.output.huggingface_repo_id or o.resume.resume_from_huggingface)


@idle("save_state_to_huggingface", reason="without --save_state or --save_state_on_train_end")
def no_state_to_upload(o: TrainNetworkOptions) -> bool:
    return not (o.output.save_state or o.output.save_state_on_train_end)


# ---- going on ----


@idle("resume_from_huggingface", reason="without --resume, which names the state")
def no_state_is_named(o: TrainNetworkOptions) -> bool:
    return not o.resume.resume


@idle("initial_epoch", reason="beside --initial_step, which wins")
def initial_step_wins(o: TrainNetworkOptions) -> bool:
    return o.resume.initial_step is not None


@idle("skip_until_initial_step", reason="without --initial_step; --initial_epoch starts where an epoch's data do")
def starts_with_an_epoch(o: TrainNetworkOptions) -> bool:
    return not o.resume.initial_step


@idle(
    "initial_epoch",
    "initial_step",
    "skip_until_initial_step",
    reason="beside --resume, whose state says where the run stands",
)
def the_state_says_where(o: TrainNetworkOptions) -> bool:
    return o.resume.resume is not None
