"""Options of training ControlNets, and the rules between them and the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.arguments import options_of_kind
from library.config.core.output import OutputOptions
from library.config.declaration import Declaration, Facts, Finding, error, idle, joined
from library.config.fields import option


@dataclass(frozen=True)
class ControlNetOptions:
    """ControlNet."""

    controlnet_model_name_or_path: str | None = option(
        None,
        "start from this ControlNet, a file, a Diffusers folder or a Hub id, instead of the model's own weights",
        harmless=True,
    )
    controlnet_layout: str | None = option(
        None,
        "names in the saved ControlNet: published, as other trainers save it; control_model, the original names with "
        "this prefix (U-Nets); diffusers, a folder",
        choices=[None, "published", "control_model", "diffusers"],
    )


@dataclass(frozen=True)
class ControlNetWithRateOptions(ControlNetOptions):
    __doc__ = ControlNetOptions.__doc__

    control_net_lr: float = option(
        1e-4,
        "learning rate of the ControlNet's own layers; --learning_rate is that of those copied from the U-Net",
        type=float,
        unit="rate",
        minimum=0,
    )


@dataclass(frozen=True)
class ControlNetForTransformersOptions(ControlNetOptions):
    __doc__ = ControlNetOptions.__doc__

    use_safetensors: bool = option(False, "write .safetensors, as is done unless --save_model_as is ckpt")
    mem_eff_save: bool = option(False, "write the ControlNet tensor by tensor, as is done in any case")
    fused_optimizer_groups: int | None = option(
        None, "refused: see --fused_backward_pass", type=int, neutral=(0,), unit="groups", minimum=1
    )
    blockwise_fused_optimizers: bool = option(False, "refused: see --fused_backward_pass")
    skip_latents_validity_check: bool = option(False, "old spelling of --skip_cache_check", harmless=True)
    double_blocks_to_swap: int | None = option(
        None, "old form of --blocks_to_swap", type=int, unit="blocks", neutral=(0,)
    )
    single_blocks_to_swap: int | None = option(
        None, "old form of --blocks_to_swap", type=int, unit="blocks", neutral=(0,)
    )


@dataclass(frozen=True)
class ControlNetOutputOptions(OutputOptions):
    __doc__ = OutputOptions.__doc__

    save_model_as: str | None = option(
        "safetensors", "format of the ControlNet's file", choices=[None, "ckpt", "pt", "safetensors"]
    )


@dataclass(frozen=True)
class ControlNetForTransformersOutputOptions(OutputOptions):
    __doc__ = OutputOptions.__doc__

    save_model_as: str | None = option(
        None,
        "form of the ControlNet: a file (.safetensors, if not given), or a folder of diffusers",
        choices=[None, "ckpt", "safetensors", "diffusers", "diffusers_safetensors"],
    )


#: all options of the scripts, except the families'
TrainControlNetOptions = options_of_kind(
    "TrainControlNetOptions", "controlnet", ControlNetOptions, ControlNetOutputOptions
)
TrainControlNetWithRateOptions = options_of_kind(
    "TrainControlNetWithRateOptions", "controlnet", ControlNetWithRateOptions, ControlNetOutputOptions
)
TrainControlNetForTransformersOptions = options_of_kind(
    "TrainControlNetForTransformersOptions",
    "controlnet",
    ControlNetForTransformersOptions,
    ControlNetForTransformersOutputOptions,
)


def is_folder(o: Any) -> bool:
    """Whether the ControlNet is saved as a folder."""
    return o.controlnet.controlnet_layout == "diffusers" or (o.output.save_model_as or "").startswith("diffusers")


# ---- what cannot work ----


def images(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.loss.masked_loss:
        yield error(
            "--masked_loss: the images of conditioning_data_dir are what a ControlNet reads, not masks; remove it, and "
            "use alpha_mask for masks"
        )


def layouts(o: Any, facts: Facts) -> Iterator[Finding]:
    given = o.controlnet.controlnet_layout
    if given not in (None, "diffusers") and (o.output.save_model_as or "").startswith("diffusers"):
        yield error(
            f"--controlnet_layout {given}: not with --save_model_as {o.output.save_model_as}, a folder; give one of "
            "them"
        )


def something_to_train(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.optimizer.learning_rate == 0 and not getattr(o.controlnet, "control_net_lr", 0):
        yield error("nothing to train: --learning_rate is 0; 1e-5 is usual for ControlNets")


def no_second_copy(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.training.on_nan != "stop":
        yield error(
            f"--on_nan {o.training.on_nan}: keeps a copy of all trained weights, which a ControlNet leaves no memory "
            "for; remove it, and resume from a state of --save_state after a bad step"
        )


# ---- what has no effect ----


@idle("controlnet_model_name_or_path", reason="with --resume, whose state holds the weights")
def weights_come_from_the_state(o: Any) -> bool:
    return bool(o.resume.resume)


@idle("mem_eff_save", reason="as ControlNets are written tensor by tensor in any case")
def saves_are_streamed(o: Any) -> bool:
    return True


@idle("use_safetensors", reason="as .safetensors is written unless --save_model_as is ckpt")
def is_safetensors_anyway(o: Any) -> bool:
    return o.output.save_model_as != "ckpt"


def forms(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.output.save_model_as == "ckpt" and o.controlnet.use_safetensors:
        yield error("--save_model_as ckpt and --use_safetensors exclude each other: give one")


_NO_METADATA = "for ControlNets, whose files have no such metadata"

DECLARATION = Declaration(
    groups={"controlnet": ControlNetOptions, "output": ControlNetOutputOptions},
    rules=(images, layouts, something_to_train, no_second_copy),
    idle=(weights_come_from_the_state,),
    unused={"no_metadata": _NO_METADATA, "training_comment": _NO_METADATA},
)
WITH_RATE = joined(DECLARATION, Declaration(groups={"controlnet": ControlNetWithRateOptions}))

_FUSED = "--fused_backward_pass updates each weight within the backward pass, which saves more memory; give that"
_SWAP = "the old form of --blocks_to_swap; give that"
FOR_TRANSFORMERS = joined(
    DECLARATION,
    Declaration(
        groups={
            "controlnet": ControlNetForTransformersOptions,
            "output": ControlNetForTransformersOutputOptions,
        },
        rules=(forms,),
        idle=(saves_are_streamed, is_safetensors_anyway),
        refused={
            "fused_optimizer_groups": _FUSED,
            "blockwise_fused_optimizers": _FUSED,
            "double_blocks_to_swap": _SWAP,
            "single_blocks_to_swap": _SWAP,
        },
    ),
)
