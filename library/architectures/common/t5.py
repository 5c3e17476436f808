"""T5 encoders (Raffel et al. 2020, arXiv:1910.10683; the gated v1.1 kind): files, tokens and states.

Shape legend: B captions, T tokens, D features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.common.expected import T5_LAYERS, check_layers
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.recognise import refuse_scaled, what_it_is
from library.architectures.common.scaled_file import with_plain_numbers
from library.architectures.common.sharded_file import open_weights
from library.architectures.common.tensor_files import Shapes
from library.architectures.common.token_rows import length_of, padded, token_ids
from library.architectures.common.tokenizer_files import sentencepiece_tokenizer
from library.architectures.conditioning import CaptionLength
from library.errors import UserError

if TYPE_CHECKING:
    from transformers import T5EncoderModel

#: Hub repository (and sub-folder) of the tokenizer
TOKENIZER = ("google/t5-v1_1-xxl", None)
#: the embedding table; files hold it under one of these names or under both
SHARED, EMBEDDINGS = "shared.weight", "encoder.embed_tokens.weight"
#: before its names in files that hold a whole model, as ComfyUI writes them
BUNDLED = "text_encoders.t5xxl.transformer."
_ATTENTION = "encoder.block.0.layer.0.SelfAttention"
_BIAS = f"{_ATTENTION}.relative_attention_bias.weight"


# ---- files ----


def t5_source(path: Path, *, flag: str = "--t5xxl", example: str = "t5xxl_fp16.safetensors or the like") -> ModelSource:
    """Return the encoder in a stand-alone file, with or without the rest of T5, in a folder, or in a whole model's
    file.

    Args:
        example: the name of the published file, for messages.

    Raises:
        UserError: the file holds something else, or is incomplete.
    """
    file = with_plain_numbers(open_weights(path))
    prefix = BUNDLED if BUNDLED + _BIAS in file.shapes else ""
    shapes = {name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    if _BIAS not in shapes:
        what = what_it_is(file.shapes.keys(), "t5", _BIAS)
        raise UserError(f"{flag} {path}: not a T5 encoder ({what}); give {example}")
    try:
        refuse_scaled(shapes)
        layout = replace(t5_layout(shapes), prefix=prefix)
        return ModelSource("T5 encoder", file, layout, infer_t5_config(shapes))
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from None


def t5_layout(names: Mapping[str, object]) -> TensorLayout:
    """Return the layout of transformers' names; the embedding table has the first of its names that exists."""
    table = SHARED if SHARED in names else EMBEDDINGS
    same = ("encoder.block", "encoder.final_layer_norm")
    return TensorLayout(KeyMap([(table, SHARED), *((name, name) for name in same)]))


def infer_t5_config(shapes: Shapes) -> dict[str, Any]:
    """Return settings of transformers' T5Config, from names and shapes alone.

    Raises:
        UserError: the names do not add up to a T5 v1.1 encoder.
    """
    table = shapes.get(SHARED) or shapes.get(EMBEDDINGS)
    query, bias = shapes.get(f"{_ATTENTION}.q.weight"), shapes.get(_BIAS)
    inner = shapes.get("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    if table is None or query is None or bias is None or inner is None:
        raise UserError("the T5 encoder's tensors are incomplete; download the file again")
    buckets, heads = bias
    numbers = (int(found[1]) for name in shapes if (found := re.match(r"encoder\.block\.(\d+)\.", name)))
    layers = max(numbers) + 1
    check_layers("T5 encoder", layers, table[1], T5_LAYERS)
    return {
        "vocab_size": table[0],
        "d_model": table[1],
        "d_kv": query[0] // heads,
        "d_ff": inner[0],
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def build_t5(config: Mapping[str, Any]) -> T5EncoderModel:
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    return T5EncoderModel(T5Config(**config))


def load_t5(source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Load the encoder, frozen, in eval mode.

    In float16 the last layer of each MLP stays in float32, as in transformers: its sums overflow float16.
    """
    model = load_frozen(source, partial(build_t5, source.config), dtype=dtype, device=device)
    model.encoder.embed_tokens.weight = model.shared.weight  # one table under two names
    if dtype == torch.float16:
        for name, module in model.named_modules():
            if name.endswith(".DenseReluDense.wo"):
                module.float()
    return model


def t5_tensors(model: nn.Module, names: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names of a file."""
    state = dict(model.state_dict())
    table = state.pop(EMBEDDINGS)
    tensors = dict(t5_layout(names).write({**state, SHARED: table}))
    return {**tensors, EMBEDDINGS: table} if EMBEDDINGS in names else tensors


# ---- text ----


def load_tokenizer(folder: Path) -> Any:
    """Load T5's tokenizer from its tokenizer.json, or from the published spiece.model.

    Raises:
        UserError: the file is damaged, or spiece.model cannot be read here.
    """
    from transformers import T5Tokenizer

    return sentencepiece_tokenizer(T5Tokenizer, folder, of="T5", file="spiece.model")


def tokenize(tokenizer: Any, captions: Sequence[str], *, length: int) -> tuple[Tensor, Tensor]:
    """Tokenize captions, truncated and padded to ``length`` tokens, the end token included.

    Returns:
        ids (B, T) int64 and mask (B, T) int64, 1 for the caption's tokens and its end, 0 for padding.
    """
    rows = [[*token_ids(tokenizer, caption)[: length - 1], tokenizer.eos_token_id] for caption in captions]
    return padded(rows, length, tokenizer.pad_token_id)


def caption_length(tokenizer: Any, caption: str, *, length: int) -> CaptionLength:
    """Return the number of tokens of a caption, and the text that ``tokenize`` cuts off."""
    return length_of(tokenizer, caption, length - 1)


def encode(encoder: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Encode ids (B, T) to the last layer's states (B, T, D); without a ``mask`` (B, T) padding is attended to.

    Autocast to float16 is off, because it would also cast the layers that ``load_t5`` keeps in float32.
    """
    kind = ids.device.type
    to_half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    with torch.autocast(kind, enabled=False) if to_half else nullcontext():
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state
