"""Names of the files and scripts of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from library.architectures.signs import About, Recognised, Sign

_USE = "use sd3_train_network.py or sd3_train.py"

ABOUT = About(
    instance="SD3",
    script="sd3_train_network",
    training=_USE,
    images="use sd3_minimal_inference.py",
    title="Stable Diffusion 3",
    tool_flag="sd3",
    signs=(
        Sign(("joint_blocks.",), Recognised("a Stable Diffusion 3 checkpoint", _USE, "sd3")),
        Sign(
            ("pos_embed.pos_embed", "transformer_blocks."), Recognised("a Stable Diffusion 3 transformer", _USE, "sd3")
        ),
    ),
    pipelines=(("StableDiffusion3", Recognised("a Stable Diffusion 3 model", _USE, "sd3")),),
    adapter_keys=("sd3",),
    model_options=("clip_l", "clip_g", "t5xxl"),
    text_options=("t5xxl_device", "t5xxl_dtype", "t5xxl_max_token_length", "apply_lg_attn_mask", "apply_t5_attn_mask"),
)
