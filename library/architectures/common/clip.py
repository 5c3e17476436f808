"""CLIP text encoders: their names in files (transformers' and OpenCLIP's), and their configuration from names and
shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.architectures.common.expected import CLIP_LAYERS, check_layers
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

HEAD_WIDTH = 64

#: files hold CLIPTextModel's tensors below this; transformers 5 dropped it from the module tree
TEXT_MODEL = "text_model."
#: everything but the stored ``position_ids``, which are computed
CLIP = tuple(
    (name, name)
    for name in ("embeddings.token_embedding", "embeddings.position_embedding", "encoder", "final_layer_norm")
)
OPENCLIP_OUTER = (
    ("token_embedding", "embeddings.token_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final", "final_layer_norm"),
)
OPENCLIP_BLOCK = (
    ("attn", "self_attn"),  # in_proj is split below
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
OPENCLIP_STACKED = (
    ("in_proj_weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight")),
    ("in_proj_bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias")),
)


#: a bare parameter (width, out) of OpenCLIP, whose pooled output is ``x @ text_projection``; transformers has a Linear
PROJECTION = "text_projection"


def clip_layout(*, prefix: str, projection: bool = False) -> TensorLayout:
    """Return the layout of transformers' names below ``prefix``; with ``projection`` of
    ``CLIPTextModelWithProjection``."""
    if projection:
        return TensorLayout(KeyMap([(name, name) for name in ("text_model", PROJECTION)]), prefix)
    return TensorLayout(KeyMap(CLIP), prefix)


def openclip_layout(layers: int, *, prefix: str, projection: bool = False) -> TensorLayout:
    """Return the layout of OpenCLIP's names of the first ``layers`` blocks; q, k and v are stacked in one tensor.

    Args:
        projection: for ``CLIPTextModelWithProjection``.
    """
    pairs = list(OPENCLIP_OUTER)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        pairs += [(f"{block}.{a}", f"encoder.layers.{layer}.{b}") for a, b in OPENCLIP_BLOCK]
    if not projection:
        return TensorLayout(KeyMap(pairs), prefix, stacked=OPENCLIP_STACKED)
    weight = f"{PROJECTION}.weight"
    pairs = [(a, TEXT_MODEL + b) for a, b in pairs] + [(PROJECTION, weight)]
    return TensorLayout(KeyMap(pairs), prefix, stacked=OPENCLIP_STACKED, transposed=(weight,))


def infer_clip_config(shapes: Mapping[str, tuple[int, ...]], *, prefix: str, activation: str) -> dict[str, Any]:
    """Return settings of transformers' CLIPTextConfig for a file with transformers' names.

    Raises:
        UserError: the names do not add up to a text encoder.
    """
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    return _config(
        tokens=shapes.get("embeddings.token_embedding.weight"),
        positions=shapes.get("embeddings.position_embedding.weight"),
        inner=shapes.get("encoder.layers.0.mlp.fc1.weight"),
        layers=_count(r"encoder\.layers\.(\d+)\.", shapes),
        activation=activation,
    )


def infer_openclip_config(shapes: Mapping[str, tuple[int, ...]], *, prefix: str, unused_layers: int) -> dict[str, Any]:
    """Return the same for OpenCLIP's names, without the last ``unused_layers`` blocks."""
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    return _config(
        tokens=shapes.get("token_embedding.weight"),
        positions=shapes.get("positional_embedding"),
        inner=shapes.get("transformer.resblocks.0.mlp.c_fc.weight"),
        layers=_count(r"transformer\.resblocks\.(\d+)\.", shapes) - unused_layers,
        activation="gelu",
    )


def _count(pattern: str, names: Mapping[str, object]) -> int:
    return max((int(found[1]) + 1 for name in names if (found := re.match(pattern, name))), default=0)


def _config(
    *,
    tokens: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
    inner: tuple[int, ...] | None,
    layers: int,
    activation: str,
) -> dict[str, Any]:
    if tokens is None or positions is None or inner is None or layers < 1:
        raise UserError("the text encoder's tensors are incomplete; download the file again")
    vocabulary, width = tokens
    check_layers("text encoder", layers, width, CLIP_LAYERS)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "max_position_embeddings": positions[0],
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def build_clip(config: Mapping[str, Any]) -> CLIPTextModel:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def build_clip_with_projection(config: Mapping[str, Any]) -> CLIPTextModelWithProjection:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def enable_gradient_checkpointing(text_encoder: CLIPTextModel) -> None:
    """Recompute the layers in the backward pass; works with frozen weights and trained adapters alike.

    transformers checkpoints layers in training mode only. CLIP has no dropout, so the mode changes nothing else.
    """
    # the newer name of the same method, which older releases of transformers 5 lack
    enable = (
        getattr(text_encoder, "activation_checkpointing_enable", None) or text_encoder.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    # that also made the embeddings require gradients, which only reentrant checkpointing needs
    text_encoder.disable_input_require_grads()
    text_encoder.train()
