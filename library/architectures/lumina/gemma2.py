"""Gemma2 (Gemma Team 2024, arXiv:2408.00118) as a text encoder: files, tokens and states.

Shape legend: B captions, T tokens, D features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.common.expected import check_layers
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.recognise import refuse_scaled, what_it_is
from library.architectures.common.scaled_file import with_plain_numbers
from library.architectures.common.sharded_file import open_weights
from library.architectures.common.tensor_files import Shapes, WeightFile
from library.architectures.common.token_rows import length_of, padded, token_ids
from library.architectures.common.tokenizer_files import sentencepiece_tokenizer
from library.architectures.conditioning import CaptionLength
from library.errors import UserError

if TYPE_CHECKING:
    from transformers import Gemma2Model

FLAG = "--gemma2"
#: Hub repositories (and sub-folder) of the tokenizer; Google's own asks for an account
TOKENIZERS = (("Alpha-VLLM/Lumina-Image-2.0", "tokenizer"), ("google/gemma-2-2b", None))
#: before its names in files that hold a whole model, as ComfyUI writes them
BUNDLED = "text_encoders.gemma2_2b.transformer.model."
#: layers by width
_LAYERS = {2304: {26}}
#: width of an attention head, which names and shapes do not show
_HEAD = 256
_TABLE = "embed_tokens.weight"
_MARK = "layers.0.pre_feedforward_layernorm.weight"
_TOP = ("embed_tokens", "layers", "norm")
#: bytes of the published tokenizer.model, which ComfyUI's files hold beside the weights
_TOKENIZER = "spiece_model"
#: tokens are padded to a multiple of this, as published
_MULTIPLE = 8


# ---- files ----


def gemma2_source(path: Path) -> ModelSource:
    """Return the encoder in its own file or folder, or in the file of a whole model.

    Raises:
        UserError: the file holds something else, or is incomplete.
    """
    file = with_plain_numbers(open_weights(path))
    prefix = next((prefix for prefix in (BUNDLED, "model.", "") if prefix + _MARK in file.shapes), None)
    if prefix is None:
        what = what_it_is(file.shapes.keys(), "gemma2", _MARK)
        raise UserError(f"{FLAG} {path}: not a Gemma2 text encoder ({what}); give gemma_2_2b_fp16.safetensors")
    shapes = {name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    try:
        refuse_scaled(shapes)
        layout = TensorLayout(KeyMap((name, name) for name in _TOP), prefix)
        return ModelSource("Gemma2", file, layout, infer_config(shapes))
    except UserError as error:
        raise UserError(f"{FLAG} {path}: {error}") from None


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """Return settings of transformers' Gemma2Config, from names and shapes alone.

    Raises:
        UserError: the names do not add up to Gemma2.
    """
    table, inner = shapes.get(_TABLE), shapes.get("layers.0.mlp.gate_proj.weight")
    query, key = (shapes.get(f"layers.0.self_attn.{x}_proj.weight") for x in "qk")
    if table is None or inner is None or query is None or key is None:
        raise UserError("Gemma2's tensors are incomplete; download the file again")
    if query[0] % _HEAD or key[0] % _HEAD:
        raise UserError(f"its attention has {query[0]} and {key[0]} rows, no multiples of {_HEAD}; give Gemma2 2B")
    layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name)))
    check_layers("Gemma2 text encoder", layers, table[1], _LAYERS)
    return {
        "vocab_size": table[0],
        "hidden_size": table[1],
        "intermediate_size": inner[0],
        "num_hidden_layers": layers,
        "num_attention_heads": query[0] // _HEAD,
        "num_key_value_heads": key[0] // _HEAD,
        "head_dim": _HEAD,
        "use_cache": False,
    }


def build(config: Mapping[str, Any]) -> Gemma2Model:
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

    # scores of attention are capped, which torch's fused attention cannot do
    return Gemma2Model(Gemma2Config(**config, attn_implementation="eager"))


def load(source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Load the encoder, frozen, in eval mode."""
    # the buffers do not depend on the number of layers and tokens
    small = build({**source.config, "num_hidden_layers": 0, "vocab_size": 8})
    computed = dict(small.named_buffers())
    return load_frozen(source, partial(build, source.config), dtype=dtype, device=device, computed=computed)


# ---- text ----


def own_tokenizer(file: WeightFile) -> Path | None:
    """Return a temporary folder with the tokenizer that the encoder's file holds; None if it holds none."""
    name = next((name for name in file.shapes if name.rpartition(".")[2] == _TOKENIZER), None)
    if name is None:
        return None
    ((_, content),) = file.read([name])
    folder = Path(_unpacked(file.path).name)
    (folder / "tokenizer.model").write_bytes(content.contiguous().view(torch.uint8).numpy().tobytes())
    return folder


@cache
def _unpacked(path: Path) -> TemporaryDirectory[str]:
    """Return the folder for the tokenizer of this file; it is removed at the end of the process."""
    return TemporaryDirectory(prefix="gemma2_tokenizer_")


def load_tokenizer(folder: Path) -> Any:
    """Load Gemma's tokenizer from its tokenizer.json, or from the published tokenizer.model.

    Raises:
        UserError: the file is damaged, or tokenizer.model cannot be read here.
    """
    from transformers import GemmaTokenizer

    return sentencepiece_tokenizer(GemmaTokenizer, folder, of="Gemma2", file="tokenizer.model")


def tokenize(tokenizer: Any, texts: Sequence[str], *, length: int) -> tuple[Tensor, Tensor]:
    """Tokenize texts, truncated to ``length`` tokens, the start token included, and padded on the right.

    Returns:
        ids (B, T) int64 and mask (B, T) int64, 1 for the start token and the text, 0 for padding. T is ``length``,
        rounded up to a multiple of 8.
    """
    rows = [[tokenizer.bos_token_id, *token_ids(tokenizer, text)][:length] for text in texts]
    return padded(rows, -(-length // _MULTIPLE) * _MULTIPLE, tokenizer.pad_token_id)


def caption_length(tokenizer: Any, text: str, *, length: int) -> CaptionLength:
    """Return the number of tokens of a text, and its end that ``tokenize`` cuts off."""
    return length_of(tokenizer, text, length - 1)


def encode(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Encode ids (B, T) to the states of the second-to-last layer (B, T, D), without the final norm."""
    output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-2]
