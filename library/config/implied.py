"""The values of options that are not given, from other options or from the run: for ``--explain``.

They restate the code that reads the options, each in one line; ``tests/config/test_explain.py`` compares the two.
"""

from __future__ import annotations

from typing import Any

from library.config.arguments import RunOptions, flat
from library.config.declaration import Declaration, Follow, Implied


def implied(options: RunOptions, own: Declaration) -> dict[str, Implied]:
    """Return the values of options that were not given, by name.

    Args:
        own: what the family and the kind declare.
    """
    found = {}
    follows = {**_FOLLOWS, **own.follows}
    for field, value in flat(options):
        follow = follows.get(field.name)
        if follow is not None and value == field.default and (result := follow(options)) is not None:
            found[field.name] = result
    return found


def _optimizer(o: RunOptions) -> Implied:
    if o.optimizer.use_8bit_adam:
        return Implied("AdamW8bit", "follows from --use_8bit_adam")
    if o.optimizer.use_lion_optimizer:
        return Implied("Lion", "follows from --use_lion_optimizer")
    return Implied("AdamW", "default")


def _steps(o: RunOptions) -> Implied | None:
    epochs = o.training.max_train_epochs
    return Implied(f"(steps of {epochs} epochs)", "follows from --max_train_epochs") if epochs is not None else None


def _saved_precision(o: RunOptions) -> Implied:
    for name, precision in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(o.training, name):
            return Implied(precision, f"follows from --{name}")
    return Implied("float", "default")


def _epochs_between_saves(o: RunOptions) -> Implied | None:
    ratio = o.output.save_n_epoch_ratio
    return Implied(f"(epochs / {ratio})", "follows from --save_n_epoch_ratio") if ratio is not None else None


def _kept_states(kind: str) -> Follow:
    def follow(o: RunOptions) -> Implied | None:
        kept = getattr(o.output, f"save_last_n_{kind}")
        return Implied(kept, f"follows from --save_last_n_{kind}") if kept and o.output.save_state else None

    return follow


def _logs(o: RunOptions) -> Implied | None:
    folder = o.output.output_dir
    return Implied(f"{folder}/logs", "follows from --output_dir") if folder else None


def _title(o: RunOptions) -> Implied | None:
    name = o.output.output_name
    return Implied(name, "follows from --output_name") if name else None


def _timescale(o: RunOptions) -> Implied | None:
    if o.scheduler.lr_scheduler != "inverse_sqrt" or o.scheduler.lr_scheduler_type:
        return None
    return Implied(o.scheduler.lr_warmup_steps, "follows from --lr_warmup_steps")


def _caption_extension(o: RunOptions) -> Implied | None:
    old = o.dataset.caption_extention
    return Implied(old, "follows from --caption_extention") if old else None


def _cache(o: RunOptions) -> Implied | None:
    return Implied(True, "follows from --cache_latents_to_disk") if o.dataset.cache_latents_to_disk else None


def _seed(o: RunOptions) -> Implied:
    return Implied("(that of the state)", "follows from --resume") if o.resume.resume else Implied("(drawn)", "default")


def _constant(value: Any) -> Follow:
    return lambda o: Implied(value, "default")


#: option -> its value; ``None`` if nothing follows
_FOLLOWS: dict[str, Follow] = {
    "max_token_length": _constant(75),
    "caption_extension": _caption_extension,
    "cache_latents": _cache,
    "output_name": _constant("last"),
    "save_precision": _saved_precision,
    "save_every_n_epochs": _epochs_between_saves,
    "save_last_n_epochs_state": _kept_states("epochs"),
    "save_last_n_steps_state": _kept_states("steps"),
    "optimizer_type": _optimizer,
    "lr_scheduler_timescale": _timescale,
    "max_train_steps": _steps,
    "seed": _seed,
    "min_timestep": _constant(0),
    "max_timestep": _constant(1000),
    "logging_dir": _logs,
    "log_with": _constant("tensorboard"),
    "log_tracker_name": _constant("network_train"),
    "metadata_title": _title,
    "console_log_level": _constant("INFO"),
}
