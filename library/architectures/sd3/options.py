"""Options that only Stable Diffusion 3 has, and their checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.architectures.network_args import is_switched_on
from library.config import block_swap
from library.config.declaration import Declaration, Facts, Finding, Implied, error, idle, joined
from library.config.fields import option
from library.config.flow import FLOW_SHIFT, WEIGHTING

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "float": "float32", "fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class SD3FullOptions:
    """Text encoders and blocks of Stable Diffusion 3 in full training."""

    train_t5xxl: bool = option(False, "train T5-XXL too; with --train_text_encoder")
    use_t5xxl_cache_only: bool = option(False, "cache the outputs of T5-XXL while CLIP-L and CLIP-G are trained")
    learning_rate_te3: float | None = option(
        None,
        "learning rate of T5-XXL (as --learning_rate, if not given); 0 freezes it",
        type=float,
        unit="rate",
        minimum=0,
    )
    num_last_block_to_freeze: int | None = option(
        None, "number of blocks at the end that are not trained", type=int, unit="blocks", minimum=0, neutral=(0,)
    )


@dataclass(frozen=True)
class SD3Options:
    """Stable Diffusion 3 and 3.5."""

    clip_l: str | None = option(
        None, "CLIP-L text encoder: a .safetensors file, or a Diffusers folder (default: the checkpoint's own)",
        weights=True,
    )  # fmt: skip
    clip_g: str | None = option(
        None, "CLIP-G text encoder: a .safetensors file, or a Diffusers folder (default: the checkpoint's own)",
        weights=True,
    )  # fmt: skip
    t5xxl: str | None = option(
        None,
        "T5-XXL text encoder: a .safetensors file, or a Diffusers folder (default: the checkpoint's own; without any, "
        "captions are encoded by CLIP alone)",
        weights=True,
    )
    save_clip: bool = option(False, "save CLIP-L and CLIP-G beside the model")
    save_t5xxl: bool = option(False, "save T5-XXL beside the model")
    t5xxl_device: str | None = option(None, "device of T5-XXL", harmless=True)
    t5xxl_dtype: str | None = option(None, "dtype of T5-XXL: fp32, fp16 or bf16 (default: as the other text encoders)")
    t5xxl_max_token_length: int = option(
        256, "number of tokens of a caption for T5-XXL", type=int, unit="tokens", minimum=1
    )
    apply_lg_attn_mask: bool = option(False, "mask the padding tokens in CLIP-L and CLIP-G")
    apply_t5_attn_mask: bool = option(False, "mask the padding tokens in T5-XXL")
    clip_l_dropout_rate: float = option(
        0.0, "share of samples that are trained without CLIP-L", type=float, unit="share", minimum=0, maximum=1
    )
    clip_g_dropout_rate: float = option(
        0.0, "share of samples that are trained without CLIP-G", type=float, unit="share", minimum=0, maximum=1
    )
    t5_dropout_rate: float = option(
        0.0, "share of samples that are trained without T5-XXL", type=float, unit="share", minimum=0, maximum=1
    )
    pos_emb_random_crop_rate: float = option(
        0.0,
        "share of samples with a random crop of the position embeddings instead of the middle",
        type=float,
        unit="share",
        minimum=0,
        maximum=1,
    )
    enable_scaled_pos_embed: bool = option(
        False, "use position embeddings scaled to each resolution of the data set instead of the model's own"
    )
    training_shift: float = option(
        1.0, "shift of the training timesteps; above 1 trains noisier images more often", type=float, unit="", above=0
    )
    blocks_to_swap: int | None = block_swap.count_option()


def trains_t5(network: Any) -> bool:
    """Whether ``--network_args`` has ``train_t5xxl=True``; the network module refuses wrong values."""
    return is_switched_on(network.network_args, "train_t5xxl")


def own_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of ``--t5xxl_dtype``."""
    import torch

    return None if name is None else getattr(torch, _DTYPES[name])


@idle("save_clip", "save_t5xxl", reason="in the training of adapters, whose files hold no text encoders")
def saves_no_encoders(o: Any) -> bool:
    return hasattr(o, "network")


def devices(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.sd3.t5xxl_dtype is not None and o.sd3.t5xxl_dtype not in _DTYPES:
        yield error(f"--t5xxl_dtype {o.sd3.t5xxl_dtype}: unknown; use fp32, fp16 or bf16")
    if o.sd3.t5xxl_device is not None:
        import torch

        try:
            torch.device(o.sd3.t5xxl_device)
        except RuntimeError:
            yield error(f"--t5xxl_device {o.sd3.t5xxl_device}: not a device; use cpu, cuda or cuda:1, for example")


def what_is_trained(o: Any, facts: Facts) -> Iterator[Finding]:
    network = getattr(o, "network", None)
    if network is not None and network.network_train_unet_only and trains_t5(network):
        yield error("--network_args train_t5xxl=True: not with --network_train_unet_only; remove one of them")


DECLARATION = joined(
    Declaration(groups={"sd3": SD3Options}, prompt_options=(FLOW_SHIFT,)),
    WEIGHTING,
    block_swap.SWAPPING,
    Declaration(
        texts={
            "network_module": "what is trained: networks.lora_sd3, or a third-party module such as lycoris.kohya",
            "network_train_unet_only": "train the transformer's adapters only",
            "unet_lr": "learning rate of the transformer's adapters (as --learning_rate, if not given)",
            "text_encoder_lr": "learning rates of the text encoders' adapters: of CLIP-L, CLIP-G and T5-XXL; the last "
            "one is for all further encoders",
        },
        rules=(devices, what_is_trained),
        idle=(saves_no_encoders,),
        unused={
            "v2": "with Stable Diffusion 3, which is not Stable Diffusion 2.x",
            "clip_skip": "with Stable Diffusion 3, which uses the second-to-last layer of both CLIPs",
            "max_token_length": "with Stable Diffusion 3, which reads 77 tokens with CLIP and "
            "--t5xxl_max_token_length with T5",
            "weighted_captions": "with Stable Diffusion 3, whose T5 reads plain text",
        },
    ),
)


# ---- whole models ----


def trained_t5(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.sd3_full.train_t5xxl:
        return
    if not o.full.train_text_encoder:
        yield error("--train_t5xxl: trains T5-XXL beside the other text encoders; add --train_text_encoder")
    if o.sd3_full.use_t5xxl_cache_only:
        yield error("--train_t5xxl: not with --use_t5xxl_cache_only, which needs a frozen T5-XXL; remove one of them")
    for name in ("t5xxl_device", "t5xxl_dtype"):
        if getattr(o.sd3, name) is not None:
            yield error(f"--{name}: a trained T5-XXL has the device and the dtype of the run; remove it")


@idle("learning_rate_te3", reason="where T5-XXL is not trained; --train_text_encoder --train_t5xxl trains it")
def t5_is_frozen(o: Any) -> bool:
    return not o.sd3_full.train_t5xxl


def t5_cache(o: Any) -> Implied | None:
    return Implied(True, "follows from --use_t5xxl_cache_only") if o.sd3_full.use_t5xxl_cache_only else None


#: of ``sd3_train.py``
FULL_DECLARATION = joined(
    DECLARATION,
    Declaration(
        groups={"sd3_full": SD3FullOptions},
        rules=(trained_t5,),
        idle=(t5_is_frozen,),
        follows={"cache_text_encoder_outputs": t5_cache},
        texts={
            "learning_rate_te": "learning rate of all text encoders (as --learning_rate, if not given); 0 freezes them",
            "learning_rate_te1": "learning rate of CLIP-L; 0 freezes it",
            "learning_rate_te2": "learning rate of CLIP-G; 0 freezes it",
        },
    ),
)
