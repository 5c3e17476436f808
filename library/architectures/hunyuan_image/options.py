"""Options that only HunyuanImage-2.1 has, and their rules."""

from __future__ import annotations

from dataclasses import dataclass

from library.config import block_swap
from library.config.declaration import Declaration, joined
from library.config.fields import option, with_default
from library.config.flow import FLOW, FlowOptions
from library.config.frozen_encoders import FROZEN_ENCODERS


@dataclass(frozen=True)
class HunyuanFlowOptions(FlowOptions):
    """Flow matching of HunyuanImage-2.1."""

    model_prediction_type: str = with_default(FlowOptions, "model_prediction_type", "raw")
    discrete_flow_shift: float = with_default(FlowOptions, "discrete_flow_shift", 5.0)


@dataclass(frozen=True)
class HunyuanOptions:
    """HunyuanImage-2.1."""

    text_encoder: str | None = option(
        None, "text encoder Qwen2.5-VL 7B: a .safetensors file, or a folder of its shards", weights=True
    )
    byt5: str | None = option(
        None, "text encoder byT5 for quoted text: a .safetensors file, or a Diffusers folder", weights=True
    )
    fp8_vl: bool = option(False, "keep Qwen2.5-VL in scaled fp8")
    text_encoder_cpu: bool = option(False, "encode captions on the CPU, whose memory is larger", harmless=True)
    vae_chunk_size: int | None = option(
        None,
        "rows that a convolution of the VAE computes at once; fewer take less memory (default: all)",
        type=int,
        unit="rows",
        minimum=1,
        harmless=True,
    )
    blocks_to_swap: int | None = block_swap.count_option()


_FROZEN_TEXT = "the text encoders of HunyuanImage-2.1 are not trained"

DECLARATION = joined(
    Declaration(groups={"hunyuan_image": HunyuanOptions}),
    FLOW,
    FROZEN_ENCODERS,
    block_swap.SWAPPING,
    Declaration(
        groups={"flow": HunyuanFlowOptions},
        texts={
            "network_module": "what is trained: networks.lora_hunyuan_image, or a third-party module such as "
            "lycoris.kohya",
            "network_train_unet_only": "train the transformer's adapters only, as always with HunyuanImage-2.1",
            "unet_lr": "learning rate of the transformer's adapters (as --learning_rate, if not given)",
            "vae": "VAE of HunyuanImage-2.1: a .safetensors file, or a Diffusers folder; required",
        },
        unused={
            "v2": "with HunyuanImage-2.1, which is not Stable Diffusion 2.x",
            "clip_skip": "with HunyuanImage-2.1, which has no CLIP",
            "max_token_length": "with HunyuanImage-2.1, which reads up to 1024 tokens of a caption",
            "weighted_captions": "with HunyuanImage-2.1, whose text encoders read plain text",
            "text_encoder_lr": f"as {_FROZEN_TEXT}",
        },
        refused={"network_train_text_encoder_only": f"{_FROZEN_TEXT}; remove it"},
    ),
)
