"""Options that only FLUX.1 and Chroma have, and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.architectures.network_args import is_switched_on
from library.config import block_swap
from library.config.declaration import Declaration, Facts, Finding, error, idle, joined, warning
from library.config.fields import option
from library.config.flow import FLOW
from library.config.frozen_encoders import FROZEN_ENCODERS

FLUX, CHROMA = "flux", "chroma"

#: blocks that ``--split_mode`` swaps, as published
SPLIT_MODE = 18


@dataclass(frozen=True)
class FluxModelOptions:
    """FLUX.1 and Chroma."""

    model_type: str = option(FLUX, "kind of the model: FLUX.1, or Chroma", choices=[FLUX, CHROMA])
    clip_l: str | None = option(
        None, "CLIP-L text encoder: a .safetensors file, or a Diffusers folder; not for Chroma", weights=True
    )
    t5xxl: str | None = option(None, "T5-XXL text encoder: a .safetensors file, or a Diffusers folder", weights=True)
    ae: str | None = option(None, "autoencoder: a .safetensors file, a Diffusers folder, or a Hub id", weights=True)
    t5xxl_max_token_length: int | None = option(
        None,
        "tokens of a caption for T5-XXL (512 if not given, 256 with FLUX.1 schnell)",
        type=int,
        unit="tokens",
        minimum=1,
    )
    apply_t5_attn_mask: bool = option(
        False, "mask the padding tokens of captions in T5-XXL and in the transformer; needed for Chroma"
    )
    guidance_scale: float = option(
        3.5,
        "embedded guidance scale of FLUX.1 dev in training, 1 is common; Chroma needs 0",
        type=float,
        unit="",
        minimum=0,
    )
    blocks_to_swap: int | None = block_swap.count_option()
    split_mode: bool = option(False, "old form of --blocks_to_swap 18", harmless=True)

    @property
    def swapped(self) -> int:
        """Return the number of blocks that wait in host memory."""
        return self.blocks_to_swap or (SPLIT_MODE if self.split_mode else 0)


@dataclass(frozen=True)
class FluxWithControlNetOptions(FluxModelOptions):
    """FLUX.1 and Chroma."""

    controlnet_model_name_or_path: str | None = option(
        None,
        "ControlNet of FLUX.1 to train beside, in diffusers' layout: a file, a folder, or a Hub id; it reads "
        "the images of conditioning_data_dir",
        weights=True,
    )


@idle("clip_l", reason="with --model_type chroma, which has no CLIP-L")
def no_clip(o: Any) -> bool:
    return o.flux.model_type == CHROMA


def guidance(o: Any, facts: Facts) -> Iterator[Finding]:
    scale = o.flux.guidance_scale
    if o.flux.model_type == CHROMA and scale != 0:
        yield error(f"--guidance_scale {scale:g}: Chroma is made for 0; add --guidance_scale 0")


def chroma_mask(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.flux.model_type == CHROMA and not o.flux.apply_t5_attn_mask:
        yield error("--model_type chroma: Chroma is made for masked captions; add --apply_t5_attn_mask")


def trains_t5(network: Any) -> bool:
    """Whether ``--network_args`` has ``train_t5xxl=True``; the network module refuses wrong values."""
    return is_switched_on(network.network_args, "train_t5xxl")


@idle("text_encoder_lr", reason="with Chroma, whose T5-XXL is trained with train_t5xxl=True in --network_args only")
def t5_is_frozen(o: Any) -> bool:
    if o.flux.model_type != CHROMA or "network" not in o.groups():
        return False
    return not trains_t5(o.network) and not o.network.network_train_unet_only


def what_is_trained(o: Any, facts: Facts) -> Iterator[Finding]:
    if "network" not in o.groups():
        return
    network = o.network
    if network.network_train_unet_only and trains_t5(network):
        yield error("--network_args train_t5xxl=True: not with --network_train_unet_only; remove one of them")
    if o.flux.model_type == CHROMA and network.network_train_text_encoder_only and not trains_t5(network):
        yield error(
            "--network_train_text_encoder_only: Chroma's only text encoder is T5-XXL; add train_t5xxl=True to "
            "--network_args"
        )


def controlnet(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.flux.controlnet_model_name_or_path:
        return
    if o.flux.model_type == CHROMA:
        yield error("--controlnet_model_name_or_path: ControlNets are made for FLUX.1, not for Chroma; remove it")
    if o.loss.masked_loss:
        yield error(
            "--masked_loss: not with --controlnet_model_name_or_path, which reads the images of "
            "conditioning_data_dir; remove it, and use alpha_mask for masks"
        )


def split_mode(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.flux.split_mode and not o.flux.blocks_to_swap:
        yield warning(f"--split_mode: taken as --blocks_to_swap {SPLIT_MODE}, which replaced it")


@idle("split_mode", reason="beside --blocks_to_swap, which wins")
def blocks_win(o: Any) -> bool:
    return bool(o.flux.blocks_to_swap)


def no_chroma(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.flux.model_type == CHROMA:
        yield error("--model_type chroma: ControlNets are trained for FLUX.1; give a file of that")


_COMMON = joined(
    FLOW,
    FROZEN_ENCODERS,
    block_swap.SWAPPING,
    Declaration(
        texts={
            "network_module": "what is trained: networks.lora_flux (or oft_flux), or a third-party module such as "
            "lycoris.kohya",
            "network_train_unet_only": "train the transformer's adapters only",
            "unet_lr": "learning rate of the transformer's adapters (as --learning_rate, if not given)",
            "text_encoder_lr": "learning rate of the text encoders' adapters: one, or one for each of CLIP-L "
            "and T5-XXL",
            "text_encoder_lr2": "the same of T5-XXL, which is trained with train_t5xxl=True in --network_args only",
        },
        rules=(guidance, chroma_mask, what_is_trained, split_mode),
        idle=(no_clip, t5_is_frozen, blocks_win),
        unused={
            "v2": "with FLUX.1, which is no Stable Diffusion 2.x",
            "vae": "with FLUX.1, whose autoencoder --ae names",
            "clip_skip": "with FLUX.1, which takes the last layer of both text encoders",
            "max_token_length": "with FLUX.1, whose captions are as long as --t5xxl_max_token_length",
            "weighted_captions": "with FLUX.1, whose T5 reads plain text",
        },
        refused={},
    ),
)

DECLARATION = joined(Declaration(groups={"flux": FluxWithControlNetOptions}, rules=(controlnet,)), _COMMON)
#: where ControlNets are trained, of which the option names the start
TRAINS_CONTROLNETS = joined(Declaration(groups={"flux": FluxModelOptions}, rules=(no_chroma,)), _COMMON)
