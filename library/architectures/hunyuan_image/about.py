"""Names of the files and scripts of HunyuanImage-2.1."""

from __future__ import annotations

from library.architectures.signs import About, Recognised, Sign

_USE = "use hunyuan_image_train_network.py or hunyuan_image_train.py"

ABOUT = About(
    instance="HUNYUAN_IMAGE",
    script="hunyuan_image_train_network",
    training=_USE,
    images="use hunyuan_image_minimal_inference.py",
    title="HunyuanImage-2.1",
    tool_flag="hunyuan_image",
    signs=(
        Sign(("byt5_in.", "double_blocks."), Recognised("a HunyuanImage-2.1 model", _USE, "hunyuan_image")),
        Sign(
            ("context_embedder_2.", "single_transformer_blocks."),
            Recognised("a HunyuanImage-2.1 transformer", _USE, "hunyuan_image"),
        ),
        Sign(
            ("txt_in.individual_token_refiner.",),
            Recognised("a HunyuanVideo model", "this family is not supported; give a model of another"),
        ),
    ),
    pipelines=(("HunyuanImage", Recognised("a HunyuanImage-2.1 model", _USE, "hunyuan_image")),),
    adapter_keys=("hunyuan_image",),
    model_options=("text_encoder", "byt5", "vae", "vae_chunk_size"),
    text_options=("fp8_vl", "text_encoder_cpu"),
)
