"""Recognize a weights file from its tensor names, for messages that name the right script or option."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from library.errors import UserError


@dataclass(frozen=True)
class Recognised:
    what: str  # "a Stable Diffusion XL checkpoint"
    remedy: str  # "use sdxl_train_network.py"
    family: str = ""  # whose plain checkpoint it is


#: (fragments that must all occur in tensor names, what the file is); the first match wins
_SIGNS: tuple[tuple[tuple[str, ...], Recognised], ...] = (
    (
        ("lora_",),
        Recognised("a LoRA file, not a base model", "give the base model here and this file with --network_weights"),
    ),
    (
        ("hada_w1_",),
        Recognised("a LyCORIS file, not a base model", "give the base model here and this file with --network_weights"),
    ),
    (
        ("conditioner.embedders.0.model.",),
        Recognised("the refiner of Stable Diffusion XL", "give the base model, or another checkpoint made from it"),
    ),
    (
        ("conditioner.embedders.",),
        Recognised("a Stable Diffusion XL checkpoint", "use sdxl_train_network.py", "sdxl"),
    ),
    (("diffusion_model.label_emb.",), Recognised("a Stable Diffusion XL U-Net", "use sdxl_train_network.py")),
    (
        ("cond_stage_model.", "diffusion_model.input_blocks."),
        Recognised("a Stable Diffusion 1.x or 2.x checkpoint", "use train_network.py", "sd"),
    ),
    (("joint_blocks.",), Recognised("a Stable Diffusion 3 checkpoint", "use sd3_train_network.py")),
    (("distilled_guidance_layer.",), Recognised("a Chroma checkpoint", "use flux_train_network.py", "flux")),
    (("txt_in.individual_token_refiner.",), Recognised("a HunyuanImage model", "use hunyuan_image_train_network.py")),
    (("double_stream_modulation_img.",), Recognised("a FLUX.2 model", "give a FLUX.1 or Chroma model")),
    (("double_blocks.", "single_blocks."), Recognised("a FLUX.1 model", "use flux_train_network.py", "flux")),
    (("single_transformer_blocks.",), Recognised("a FLUX.1 model in Diffusers layout", "use flux_train_network.py")),
    (("cap_embedder.",), Recognised("a Lumina Image 2.0 model", "use lumina_train_network.py")),
    (("control_model.",), Recognised("a ControlNet", "give a Stable Diffusion checkpoint here")),
    (("emb_params",), Recognised("a textual inversion embedding", "give a Stable Diffusion checkpoint here")),
    (
        ("down_blocks.", "mid_block.", "conv_norm_out.", "time_embedding."),
        Recognised("a bare U-Net in Diffusers layout", "give the Diffusers folder that it belongs to"),
    ),
    (
        ("encoder.conv_in.", "decoder.conv_in."),
        Recognised("a VAE, not a whole checkpoint", "give the checkpoint here and this file with --vae (FLUX: --ae)"),
    ),
    (
        ("text_model.encoder.layers.",),
        Recognised("a bare CLIP text encoder", "give a whole checkpoint here (FLUX: the transformer)", "clip"),
    ),
    (
        ("encoder.block.", ".SelfAttention."),
        Recognised("a T5 text encoder", "give the transformer here and this file with --t5xxl", "t5"),
    ),
)

#: ``_class_name`` prefixes of model_index.json, longest first
_PIPELINES: tuple[tuple[str, Recognised], ...] = (
    ("StableDiffusionXL", Recognised("a Stable Diffusion XL model", "use sdxl_train_network.py", "sdxl")),
    ("StableDiffusion3", Recognised("a Stable Diffusion 3 model", "use sd3_train_network.py")),
    ("StableDiffusion", Recognised("a Stable Diffusion 1.x or 2.x model", "use train_network.py", "sd")),
    ("Flux", Recognised("a FLUX.1 model", "use flux_train_network.py", "flux")),
    ("Chroma", Recognised("a Chroma model", "use flux_train_network.py", "flux")),
    ("Lumina", Recognised("a Lumina model", "use lumina_train_network.py")),
    ("HunyuanImage", Recognised("a HunyuanImage model", "use hunyuan_image_train_network.py")),
)


def recognise_tensors(names: Collection[str], family: str) -> Recognised | None:
    """Return what a single file is; None if it is unknown, or of the ``family`` itself."""
    for fragments, found in _SIGNS:
        if all(any(fragment in name for name in names) for fragment in fragments):
            return found if found.family != family else None
    return None


def recognise_pipeline(class_name: str, family: str) -> Recognised | None:
    """Return what a Diffusers folder is, by the pipeline in its model_index.json; None as above."""
    found = next((found for prefix, found in _PIPELINES if class_name.startswith(prefix)), None)
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
