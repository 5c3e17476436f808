"""Names of the files and scripts of FLUX.1 and Chroma."""

from __future__ import annotations

from library.architectures.signs import About, Recognised, Sign

_USE = "use flux_train_network.py, flux_train.py or flux_train_control_net.py"

ABOUT = About(
    instance="FLUX",
    script="flux_train_network",
    training=_USE,
    images="use flux_minimal_inference.py",
    title="FLUX.1 or Chroma",
    tool_flag="flux",
    signs=(
        Sign(("distilled_guidance_layer.",), Recognised("a Chroma checkpoint", _USE, "flux")),
        Sign(("double_stream_modulation_img.",), Recognised("a FLUX.2 model", "give a FLUX.1 or Chroma model")),
        Sign(("double_blocks.", "single_blocks."), Recognised("a FLUX.1 model", _USE, "flux")),
        Sign(("single_transformer_blocks.",), Recognised("a FLUX.1 model in Diffusers layout", _USE)),
    ),
    pipelines=(
        ("Flux", Recognised("a FLUX.1 model", _USE, "flux")),
        ("Chroma", Recognised("a Chroma model", _USE, "flux")),
    ),
    adapter_keys=("flux", "chroma"),
    model_options=("model_type", "clip_l", "t5xxl", "ae"),
    text_options=("t5xxl_max_token_length", "apply_t5_attn_mask"),
)
