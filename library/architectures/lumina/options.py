"""Options that only Lumina-Image 2.0 has, and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config import block_swap
from library.config.attention import missing_package
from library.config.declaration import Declaration, Facts, Finding, error, idle, joined
from library.config.fields import option, with_default
from library.config.flow import FLOW, FlowOptions
from library.config.frozen_encoders import FROZEN_ENCODERS
from library.config.prompt_options import PromptOption, number_from_zero, share

#: tokens of a caption, if not given
LENGTH = 256


@dataclass(frozen=True)
class LuminaFlowOptions(FlowOptions):
    """Flow matching."""

    timestep_sampling: str = option(
        "shift",
        "distribution of timesteps: by --weighting_scheme (sigma), uniform, most in the middle (sigmoid), that "
        "moved towards noise by --discrete_flow_shift (shift) or by the image's size (flux_shift), or uniform "
        "moved by the image's size (nextdit_shift)",
        choices=["sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"],
    )
    model_prediction_type: str = with_default(FlowOptions, "model_prediction_type", "raw")
    discrete_flow_shift: float = with_default(FlowOptions, "discrete_flow_shift", 6.0)


@dataclass(frozen=True)
class LuminaOptions:
    """Lumina-Image 2.0."""

    gemma2: str | None = option(
        None, "Gemma2 2B text encoder: a .safetensors file, or a Diffusers folder (default: the model's own)",
        weights=True,
    )  # fmt: skip
    ae: str | None = option(
        None, "autoencoder of FLUX.1: a .safetensors file, a Diffusers folder, or a Hub id (default: the model's own)",
        weights=True,
    )  # fmt: skip
    gemma2_max_token_length: int | None = option(
        None, f"tokens of a caption, the system prompt's included ({LENGTH} if not given)", type=int, unit="tokens",
        minimum=1,
    )  # fmt: skip
    system_prompt: str = option(
        "", "text before every caption and prompt, followed by <Prompt Start>; not before negative prompts"
    )
    use_flash_attn: bool = option(False, "use the attention of the package flash-attn", harmless=True)
    use_sage_attn: bool = option(False, "use the attention of the package sageattention", harmless=True)
    sample_batch_size: int | None = option(
        None, "sample images that are generated together", type=int, unit="images", minimum=1, harmless=True
    )
    blocks_to_swap: int | None = block_swap.count_option()


def flash_package(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.lumina.use_flash_attn:
        return
    if missing := missing_package("flash", "--use_flash_attn"):
        yield error(missing)
    if o.training.mixed_precision == "no":
        yield error("--use_flash_attn: works in half precision only; add --mixed_precision bf16, or use --sdpa")

    if o.training.attn_mode not in (None, "flash"):
        yield error(f"--use_flash_attn: not with --attn_mode {o.training.attn_mode}, another attention; remove one")


@idle("sdpa", "xformers", "mem_eff_attn", reason="beside --use_flash_attn, which wins")
def flash_wins(o: Any) -> bool:
    return o.lumina.use_flash_attn


DECLARATION = joined(
    FLOW,
    FROZEN_ENCODERS,
    block_swap.SWAPPING,
    Declaration(
        groups={"flow": LuminaFlowOptions, "lumina": LuminaOptions},
        prompt_options=(
            PromptOption("ctr", "cfg_trunc_ratio", share),
            PromptOption("rcfg", "renorm_cfg", number_from_zero),
        ),
        texts={
            "network_module": "what is trained: networks.lora_lumina, or a third-party module such as lycoris.kohya",
            "network_train_unet_only": "train the transformer's adapters only",
            "unet_lr": "learning rate of the transformer's adapters (as --learning_rate, if not given)",
            "text_encoder_lr": "learning rate of Gemma2's adapters",
        },
        rules=(flash_package,),
        idle=(flash_wins,),
        refused={
            "use_sage_attn": "its attention has no backward pass, so nothing can be trained with it; use "
            "--use_flash_attn or --sdpa",
        },
        unused={
            "v2": "with Lumina-Image 2.0, which is no Stable Diffusion 2.x",
            "vae": "with Lumina-Image 2.0, whose autoencoder --ae names",
            "clip_skip": "with Lumina-Image 2.0, which uses the second-to-last layer of Gemma2",
            "max_token_length": "with Lumina-Image 2.0, whose captions are as long as --gemma2_max_token_length",
            "weighted_captions": "with Lumina-Image 2.0, whose Gemma2 reads plain text",
        },
    ),
)
