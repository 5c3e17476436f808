"""Recognize a weights file from its tensor names, for messages that name the right script or option.

Families describe their files in ``about.py``; files of no family are described here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from library.architectures.registry import abouts
from library.architectures.signs import Recognised, Sign
from library.errors import UserError

_WITH_BASE = "give the base model here and this file with --network_weights"
_UNSUPPORTED = "this family is not supported yet; give a model of another"
#: compared before the signs of the families
_FIRST = (
    Sign(("lora_",), Recognised("a LoRA file, not a base model", _WITH_BASE)),
    Sign(("hada_w1_",), Recognised("a LyCORIS file, not a base model", _WITH_BASE)),
)
#: compared after the signs of the families
_LAST = (
    Sign(("control_model.",), Recognised("a ControlNet", "give a Stable Diffusion checkpoint here")),
    Sign(("emb_params",), Recognised("a textual inversion embedding", "give a Stable Diffusion checkpoint here")),
    Sign(
        ("down_blocks.", "mid_block.", "conv_norm_out.", "time_embedding."),
        Recognised("a bare U-Net in Diffusers layout", "give the Diffusers folder that it belongs to"),
    ),
    Sign(
        ("encoder.conv_in.", "decoder.conv_in."),
        Recognised("a VAE, not a whole checkpoint", "give the checkpoint here and this file with --vae (FLUX: --ae)"),
    ),
    Sign(
        ("text_model.encoder.layers.",),
        Recognised("a bare CLIP text encoder", "give a whole checkpoint here (FLUX: the transformer)", "clip"),
    ),
    Sign(
        ("visual.blocks.", ".self_attn.q_proj."),
        Recognised("Qwen2.5-VL", "give the transformer here and this file with --text_encoder", "qwen"),
    ),
    Sign(
        ("encoder.block.", ".SelfAttention."),
        Recognised("a T5 text encoder", "give the transformer here and this file with --t5xxl", "t5"),
    ),
    Sign(
        (".pre_feedforward_layernorm.",),
        Recognised("a Gemma2 text encoder", "give the transformer here and this file with --gemma2", "gemma2"),
    ),
)

#: see ``About.pipelines``
_OTHER_PIPELINES: tuple[tuple[str, Recognised], ...] = (("Lumina", Recognised("a Lumina-Next model", _UNSUPPORTED)),)


def _signs() -> Iterator[Sign]:
    yield from _FIRST
    for about in abouts():
        yield from about.signs
    yield from _LAST


def recognise_tensors(names: Collection[str], family: str) -> Recognised | None:
    """Return what a single file is; None if it is unknown, or of the ``family`` itself."""
    for sign in _signs():
        if all(any(fragment in name for name in names) for fragment in sign.fragments):
            return sign.found if sign.found.family != family else None
    return None


def refuse_other(path: Path | str, names: Collection[str], family: str) -> None:
    """Raise UserError if a single file is known, and of another family."""
    other = recognise_tensors(names, family)
    if other is not None:
        raise UserError(f"{path} is {other.what}; {other.remedy}")


def unknown(path: Path | str, names: Collection[str], wanted: str) -> UserError:
    """Return the error for a file that is nothing known, where ``wanted`` is needed."""
    return UserError(f"{path} is not a {wanted} (its first tensor is {next(iter(names), 'none')})")


def what_it_is(names: Collection[str], family: str, missing: str) -> str:
    """Return what a file is instead of ``family``, or else that it has no tensor called ``missing``."""
    other = recognise_tensors(names, family)
    return f"it is {other.what}" if other else f"no {missing}"


def recognise_pipeline(class_name: str, family: str) -> Recognised | None:
    """Return what a Diffusers folder is, by the pipeline in its model_index.json; None as above."""
    known = [*_OTHER_PIPELINES, *(pair for about in abouts() for pair in about.pipelines)]
    # the longest beginning is the most specific: StableDiffusionXL before StableDiffusion
    fitting = [pair for pair in known if class_name.startswith(pair[0])]
    found = max(fitting, key=lambda pair: len(pair[0]), default=("", None))[1]
    return found if found is not None and found.family != family else None


#: suffixes of the scales that some quantized formats store beside weights
_SCALES = (
    "scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant", ".absmax",
)  # fmt: skip


def refuse_scaled(names: Iterable[str]) -> None:
    """Raise UserError, without the file's name, for weights in fp8 or 4 bits with scales."""
    for name in names:
        if name.endswith(_SCALES):
            raise UserError(
                f"the weights are quantised with scales of their own ({name}); give a bf16, fp16 or plain fp8 file"
            )
