"""Options of training whole models, and the rules between them and the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config import block_swap
from library.config.arguments import options_of_kind
from library.config.core.output import OutputOptions
from library.config.core.training import shards_optimizer
from library.config.declaration import Declaration, Facts, Finding, error, idle, message, warning
from library.config.fields import option
from library.launched import process_count

#: how many learning rates --block_lr takes
BLOCKS = 23
_FUSED = ("fused_backward_pass", "fused_optimizer_groups", "blockwise_fused_optimizers")


@dataclass(frozen=True)
class FullOptions:
    """Whole models."""

    train_text_encoder: bool = option(False, "train the text encoders too (train_db.py trains them anyway)")
    learning_rate_te: float | None = option(
        None,
        "learning rate of the text encoder (as --learning_rate, if not given); 0 freezes it",
        type=float,
        unit="rate",
        minimum=0,
    )
    learning_rate_te1: float | None = option(
        None, "the same for the first of several text encoders (CLIP-L)", type=float, unit="rate", minimum=0
    )
    learning_rate_te2: float | None = option(
        None,
        "the same for the second (OpenCLIP ViT-bigG of SDXL and Stable Diffusion 3)",
        type=float,
        unit="rate",
        minimum=0,
    )
    stop_text_encoder_training: int | None = option(
        None, "train the text encoder up to this step; 0 or less: not at all", type=int, unit="step"
    )
    block_lr: str | None = option(
        None,
        f"learning rates of the U-Net's blocks, {BLOCKS} numbers separated by commas; 0 freezes a block",
    )
    use_safetensors: bool = option(
        False, "write .safetensors where the model's own form or --save_model_as would be a pickle"
    )
    mem_eff_save: bool = option(False, "write the model tensor by tensor, as is done in any case")
    diffusers_xformers: bool = option(False, "use xformers' attention, as --xformers")
    no_token_padding: bool = option(False, "do not pad captions")
    fused_optimizer_groups: int | None = option(
        None,
        "as --fused_backward_pass, with the weights updated in this many groups",
        type=int,
        neutral=(0,),
        unit="groups",
        minimum=1,
    )
    blockwise_fused_optimizers: bool = option(
        False, "as --fused_backward_pass, with the weights updated block by block"
    )
    skip_latents_validity_check: bool = option(False, "old spelling of --skip_cache_check", harmless=True)
    double_blocks_to_swap: int | None = option(
        None, "old form of --blocks_to_swap, to which it is added", type=int, unit="blocks", neutral=(0,), minimum=0
    )
    single_blocks_to_swap: int | None = option(
        None, "the same, of which half is added", type=int, unit="blocks", neutral=(0,), minimum=0
    )


@dataclass(frozen=True)
class FullOutputOptions(OutputOptions):
    __doc__ = OutputOptions.__doc__

    save_model_as: str | None = option(
        None,
        "form of the saved model: a file, or a folder of diffusers (as the base model, if not given)",
        choices=[None, "ckpt", "safetensors", "diffusers", "diffusers_safetensors"],
    )


#: all options of the scripts that train whole models, except the families'
TrainFullOptions = options_of_kind("TrainFullOptions", "full", FullOptions, FullOutputOptions)


def block_rates(text: str) -> list[float]:
    """Return the numbers of ``--block_lr``.

    Raises:
        ValueError: no numbers, or another number of them.
    """
    rates = [float(word) for word in text.split(",")]
    if len(rates) != BLOCKS:
        raise ValueError(f"{len(rates)} numbers")
    return rates


# ---- what cannot work ----


def trained_encoders(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check the number of learning rates of text encoders, and that trained encoders are not cached."""
    full = o.full
    numbered = [n for n in ("learning_rate_te1", "learning_rate_te2") if getattr(full, n) is not None]
    if numbered and facts.text_encoders < 2:
        yield warning(f"{message(numbered, 'with this model')}, which has one text encoder; use --learning_rate_te")
    elif numbered and full.learning_rate_te is not None:
        yield warning(
            f"{message(['learning_rate_te'], 'beside --learning_rate_te1 or --learning_rate_te2, which win')}"
        )
    caches = o.dataset.cache_text_encoder_outputs or o.dataset.cache_text_encoder_outputs_to_disk
    if caches and any(facts.trained_encoders) and all(facts.live_encoders):
        yield error(
            "--cache_text_encoder_outputs: not while a text encoder is trained, whose outputs change; remove it, or "
            "train the denoiser alone"
        )


def something_to_train(o: Any, facts: Facts) -> Iterator[Finding]:
    rates = _rates(o)
    if o.optimizer.learning_rate == 0 and not any(rates or []) and not any(facts.trained_encoders):
        yield error("nothing to train: --learning_rate is 0, and no text encoder is trained")
    if rates is not None and not any(rates) and not any(facts.trained_encoders):
        yield error("nothing to train: every number of --block_lr is 0, and no text encoder is trained")
    if o.optimizer.learning_rate == 0 and o.full.block_lr:
        yield error("--block_lr: --learning_rate 0 leaves the U-Net as it is; give another one, or remove --block_lr")


def _rates(o: Any) -> list[float] | None:
    try:
        return block_rates(o.full.block_lr) if o.full.block_lr else None
    except ValueError:
        return None  # a separate error


def blocks(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.full.block_lr:
        return
    try:
        rates = block_rates(o.full.block_lr)
    except ValueError as problem:
        yield error(f"--block_lr {o.full.block_lr}: {problem}; write {BLOCKS} numbers separated by commas")
        return
    if any(not 0 <= rate < float("inf") for rate in rates):
        yield error(f"--block_lr {o.full.block_lr}: every number must be 0 or more")


def forms(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.output.save_model_as == "ckpt" and o.full.use_safetensors:
        yield error("--save_model_as ckpt and --use_safetensors exclude each other: give one")
    if o.output.save_precision is None and (o.training.full_fp16 or o.training.full_bf16):
        return
    if o.output.save_precision is None and o.training.mixed_precision != "no":
        yield warning(
            "--save_precision is not given: trained parts are saved in float32, twice the size of half precision; "
            "fp16 or bf16 is usual"
        )


def fused(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check fused updates, which exclude each other and options that need all gradients at once."""
    given = [name for name in _FUSED if getattr(o.optimizer if name == _FUSED[0] else o.full, name)]
    if len(given) > 1:
        yield error(f"{' and '.join(f'--{name}' for name in given)} exclude each other: give one")
        return
    if not given or given == [_FUSED[0]]:
        return  # whose own rules are those of all kinds
    flag = f"--{given[0]}"
    if o.optimizer.max_grad_norm > 0:
        yield error(f"{flag}: the gradient cannot be clipped as a whole; add --max_grad_norm 0")
    if o.training.gradient_accumulation_steps > 1:
        yield warning(f"{flag}: saves little memory with --gradient_accumulation_steps; remove one of them")
    if o.training.mixed_precision == "fp16":
        yield error(f"{flag}: not with --mixed_precision fp16, whose steps may be left out; use bf16")
    if process_count() > 1:
        yield error(f"{flag}: not with several processes, which average whole gradients; remove it")
    if shards_optimizer(o.training):
        yield error(f"{flag}: not with DeepSpeed, which updates all weights at once; remove one of them")


def stops(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check that weights that are left alone from some step on can be left alone."""
    stop = o.full.stop_text_encoder_training
    if stop is not None and stop > 0 and shards_optimizer(o.training):
        yield error(
            f"--stop_text_encoder_training {stop}: not with DeepSpeed, which updates all weights in each step; remove "
            "one of them"
        )


def no_way_back(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check that updates can be left out: a fused one is made before all gradients are known."""
    flags = [f"--{name}" for name in _FUSED[1:] if getattr(o.full, name)]
    if o.training.on_nan != "stop" and flags:
        yield error(
            f"{flags[0]}: not with --on_nan {o.training.on_nan}, as the update is made before all gradients are known; "
            "remove one of them"
        )


# ---- what has no effect ----


@idle(
    "learning_rate_te",
    "learning_rate_te1",
    "learning_rate_te2",
    reason="where no text encoder is trained; --train_text_encoder trains them",
)
def text_is_frozen(o: Any) -> bool:
    return not o.full.train_text_encoder


@idle(
    "stop_text_encoder_training",
    reason="where no text encoder is trained; --train_text_encoder trains them",
)
def nothing_to_stop(o: Any) -> bool:
    # 0 or less is itself the wish that none is trained
    return not o.full.train_text_encoder and (o.full.stop_text_encoder_training or 0) > 0


@idle("mem_eff_save", reason="as models are written tensor by tensor in any case")
def saves_are_streamed(o: Any) -> bool:
    return True


@idle("no_token_padding", reason="as the text encoder is made for captions of its full length")
def captions_are_padded(o: Any) -> bool:
    return True


#: options that store a frozen denoiser in fp8
FP8_OF_DENOISER = ("fp8_base", "fp8_base_unet", "fp8_scaled", "fp8_matmul")


@idle("double_blocks_to_swap", "single_blocks_to_swap", reason="beside --blocks_to_swap, which wins")
def new_form_wins(o: Any) -> bool:
    return block_swap.is_given(o)


DECLARATION = Declaration(
    groups={"full": FullOptions},
    rules=(trained_encoders, something_to_train, blocks, forms, fused, stops, no_way_back),
    idle=(text_is_frozen, nothing_to_stop, saves_are_streamed, captions_are_padded, new_form_wins),
    unused={
        **dict.fromkeys(
            (*FP8_OF_DENOISER, "quantize_base"), "where whole models are trained, for which fp8 is too coarse"
        ),
        "no_metadata": "where whole models are trained, whose files have no such metadata",
        "training_comment": "where whole models are trained, whose files have no such metadata",
    },
)
