"""Options of the optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.declaration import Declaration, Facts, Finding, error, warning
from library.config.fields import int_or_float, option
from library.launched import process_count


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option(
        "",
        "AdamW (if not given), AdamW8bit, Lion, Adafactor, Prodigy, ..., a class of torch.optim, or module.Class",
        harmless=True,
    )
    use_8bit_adam: bool = option(False, "old spelling of --optimizer_type AdamW8bit", harmless=True)
    use_lion_optimizer: bool = option(False, "old spelling of --optimizer_type Lion", harmless=True)
    optimizer_args: list[str] | None = option(
        None, "more arguments, key=value, e.g. weight_decay=0.01 betas=.9,.999", nargs="*"
    )
    learning_rate: float = option(
        2e-06, "learning rate; 1e-4 to 1e-3 are common for LoRA", type=float, unit="rate", minimum=0
    )
    max_grad_norm: float = option(
        1.0, "gradient clipping: largest norm of the gradient; 0 turns it off", type=float, unit="norm", minimum=0
    )
    fused_backward_pass: bool = option(
        False, "update each weight as soon as its gradient is computed, to save memory; needs --max_grad_norm 0"
    )
    ema_decay: float | None = option(
        None,
        "also save a moving average (EMA) of the weights, as <name>-ema; 0.999 is common",
        type=float,
        unit="",
        above=0,
        below=1,
    )

    @property
    def finds_learning_rate(self) -> bool:
        """Whether the optimizer finds the learning rate by itself."""
        name = self.optimizer_type.lower().rpartition(".")[2]
        fixed = any(word.replace(" ", "") == "relative_step=False" for word in self.optimizer_args or [])
        return name.startswith(("dadapt", "prodigy")) or (name == "adafactor" and not fixed)


@dataclass(frozen=True)
class SchedulerOptions:
    """Learning-rate schedule."""

    lr_scheduler: str = option(
        "constant", "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, ..."
    )
    lr_warmup_steps: int | float = option(
        0, "warm-up steps, or a fraction of the run (0.1 or 10%)", type=int_or_float, unit="steps, or share of the run"
    )
    lr_decay_steps: int | float = option(
        0,
        "decay steps of warmup_stable_decay, or a fraction of the run",
        type=int_or_float,
        unit="steps, or share of the run",
    )
    lr_scheduler_num_cycles: int = option(1, "restarts of cosine_with_restarts", type=int, unit="cycles", minimum=1)
    lr_scheduler_power: float = option(1, "power of polynomial", type=float, unit="")
    lr_scheduler_timescale: int | None = option(
        None,
        "timescale of inverse_sqrt, steps (the warm-up's, if not given)",
        type=int,
        neutral=(0,),
        unit="steps",
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "lowest learning rate, as a fraction of the highest, of schedules that have one",
        type=float,
        unit="share, 0 to 1",
    )
    lr_scheduler_type: str = option("", "a scheduler class instead: of torch.optim.lr_scheduler, or module.Class")
    lr_scheduler_args: list[str] | None = option(
        None, "arguments of the schedule, key=value, e.g. num_cycles=1.5", nargs="*"
    )


# ---- what cannot work ----


def optimizer_names(o: Any, facts: Facts) -> Iterator[Finding]:
    chosen = o.optimizer
    if sum((bool(chosen.optimizer_type), chosen.use_8bit_adam, chosen.use_lion_optimizer)) > 1:
        yield error("--optimizer_type, --use_8bit_adam and --use_lion_optimizer exclude each other: give one")


def fused_backward(o: Any, facts: Facts) -> Iterator[Finding]:
    """Options that need all gradients at once exclude ``--fused_backward_pass``."""
    if not o.optimizer.fused_backward_pass:
        return
    if o.optimizer.max_grad_norm > 0:
        yield error("--fused_backward_pass: the gradient cannot be clipped as a whole; add --max_grad_norm 0")
    if o.training.gradient_accumulation_steps > 1:
        yield warning(
            "--fused_backward_pass: saves little memory with --gradient_accumulation_steps, as the gradients of all "
            "weights are kept between the batches of a step; remove one of them"
        )
    if o.training.mixed_precision == "fp16":
        yield error("--fused_backward_pass: not with --mixed_precision fp16, whose steps may be left out; use bf16")
    if o.training.on_nan != "stop":
        yield error(
            f"--fused_backward_pass: not with --on_nan {o.training.on_nan}, as the update is made before all gradients "
            "are checked; remove one of them"
        )
    if process_count() > 1:
        yield error("--fused_backward_pass: not with several processes, which average whole gradients; remove it")


DECLARATION = Declaration(
    groups={"optimizer": OptimizerOptions, "scheduler": SchedulerOptions},
    rules=(
        optimizer_names,
        fused_backward,
    ),
)
