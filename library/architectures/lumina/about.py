"""Names of the files and scripts of Lumina-Image 2.0."""

from __future__ import annotations

from library.architectures.signs import About, Recognised, Sign

_USE = "use lumina_train_network.py or lumina_train.py"

ABOUT = About(
    instance="LUMINA",
    script="lumina_train_network",
    training=_USE,
    images="use lumina_minimal_inference.py",
    title="Lumina-Image 2.0",
    tool_flag="lumina",
    signs=(
        Sign(("cap_embedder.",), Recognised("a Lumina-Image 2.0 model", _USE, "lumina")),
        Sign(("time_caption_embed.",), Recognised("a Lumina-Image 2.0 transformer", _USE, "lumina")),
    ),
    pipelines=(("Lumina2", Recognised("a Lumina-Image 2.0 model", _USE, "lumina")),),
    adapter_keys=("lumina",),
    model_options=("gemma2", "ae"),
    text_options=("gemma2_max_token_length", "system_prompt"),
)
