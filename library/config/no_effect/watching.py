"""Options without effect on sample images and logs."""

from __future__ import annotations

from library.config.arguments import TrainNetworkOptions
from library.config.no_effect.declare import idle


@idle("sample_every_n_steps", reason="at 0 or below, which is off; leave it out")
def samples_by_steps_are_off(o: TrainNetworkOptions) -> bool:
    return o.sample.steps_between is None


@idle("sample_every_n_epochs", reason="at 0 or below, which is off; leave it out")
def samples_by_epochs_are_off(o: TrainNetworkOptions) -> bool:
    return o.sample.epochs_between is None


@idle("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first", reason="without --sample_prompts, a file")
def no_prompts(o: TrainNetworkOptions) -> bool:
    return not o.sample.sample_prompts


@idle(
    "sample_prompts",
    reason="without --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first",
)
def prompts_are_never_drawn(o: TrainNetworkOptions) -> bool:
    return not o.sample.is_asked_for


@idle("sample_every_n_steps", reason="beside --sample_every_n_epochs, which wins")
def epochs_of_samples_win(o: TrainNetworkOptions) -> bool:
    return o.sample.epochs_between is not None


@idle("sample_sampler", reason="where no sample images are drawn")
def nothing_is_drawn(o: TrainNetworkOptions) -> bool:
    return not (o.sample.sample_prompts and o.sample.is_asked_for)


@idle("wandb_run_name", "wandb_api_key", reason="without --log_with wandb")
def no_wandb(o: TrainNetworkOptions) -> bool:
    return o.logging.log_with not in ("wandb", "all")
