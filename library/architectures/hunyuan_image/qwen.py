"""Qwen2.5-VL as a text encoder: transformers' ``Qwen2_5_VLTextModel``, loaded from the published single file.

HunyuanImage-2.1 takes the states of the third-last place: the output of all layers but the last two, without the final
norm. So these two, the norm, the images' part and the output layer are not loaded.

Shape legend: T tokens, D features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.common import token_rows
from library.architectures.common.expected import check_layers
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.recognise import refuse_scaled, what_it_is
from library.architectures.common.scaled_file import with_plain_numbers
from library.architectures.common.sharded_file import open_weights
from library.architectures.common.sources import in_file
from library.architectures.common.tensor_files import Shapes, WeightFile
from library.architectures.conditioning import CaptionLength
from library.errors import UserError
from library.memory.stored_layers import store_weights

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLTextModel

#: Hub repository (and sub-folder) of the tokenizer
TOKENIZER = ("Qwen/Qwen2.5-VL-7B-Instruct", None)
#: layers at the end whose outputs are not used
UNUSED = 2
#: width of a head in all published sizes; only the product with the number of heads is in the file
HEAD = 128
#: layers of published models, by width
LAYERS = {2048: {36}, 3584: {28}, 8192: {80}}
_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
#: how names begin: in the published file, in those of newer transformers, and in diffusers' folders
_ROOTS = ("model.", "model.language_model.", "language_model.model.")

#: the chat template (Tencent 2025, as in diffusers' ``HunyuanImagePipeline``)
SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
END = "<|im_end|>"
#: tokens of ``SYSTEM``, whose states are not used
START = 34
#: tokens of a caption, and the end of its turn
LENGTH = 1024


# ---- files ----


def qwen_source(path: Path) -> ModelSource:
    """Return the text encoder in the published file, or in a folder of shards.

    Raises:
        UserError: the file holds something else, or is incomplete.
    """
    return in_file(path, _found, with_plain_numbers(open_weights(path)))


def _found(file: WeightFile) -> ModelSource:
    root = next((root for root in _ROOTS if f"{root}layers.0.self_attn.q_proj.bias" in file.shapes), None)
    if root is None:
        what = what_it_is(file.shapes.keys(), "qwen", "model.layers.0.self_attn.q_proj.bias")
        raise UserError(f"not Qwen2.5-VL ({what}); give qwen_2.5_vl_7b.safetensors")
    refuse_scaled(name for name in file.shapes if name.startswith(root))
    shapes = {name[len(root) :]: shape for name, shape in file.shapes.items() if name.startswith(root)}
    config = infer_config(shapes)
    used = ["embed_tokens", *(f"layers.{index}" for index in range(config["num_hidden_layers"]))]
    unused = (f"{root}layers.{config['num_hidden_layers'] + index}." for index in range(UNUSED))
    layout = TensorLayout(KeyMap((name, name) for name in used), root)
    return ModelSource("Qwen2.5-VL", file, layout, config, spare=(*unused, f"{root}norm.", f"{root}visual."))


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """Return settings of transformers' ``Qwen2_5_VLTextConfig``, from names and shapes without prefix.

    Raises:
        UserError: the names do not add up to the model.
    """
    names = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight")
    table, query, key = (shapes.get(name) for name in names)
    inner = shapes.get("layers.0.mlp.gate_proj.weight")
    numbers = [int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name))]
    if table is None or query is None or key is None or inner is None or len(set(numbers)) <= UNUSED:
        raise UserError("Qwen2.5-VL's tensors are incomplete; download the file again")
    layers, width = 1 + max(numbers), table[1]
    check_layers("text encoder Qwen2.5-VL", layers, width, LAYERS)
    if query[0] != width or width % HEAD or key[0] % HEAD:
        raise UserError(f"attention heads of width {HEAD} do not fit {width} features; the file is of another model")
    return {
        "vocab_size": table[0],
        "hidden_size": width,
        "intermediate_size": inner[0],
        "num_hidden_layers": layers - UNUSED,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": key[0] // HEAD,
        "rms_norm_eps": 1e-6,
        "use_cache": False,
        "rope_parameters": _ROPE,
    }


def build_qwen(config: Mapping[str, Any]) -> Qwen2_5_VLTextModel:
    """Return the model without the final norm; ``load_qwen`` adds the positions, which are not in the file."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**config))
    model.norm = nn.Identity()
    model.rotary_emb = nn.Identity()
    return model


def load_qwen(source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Load the encoder, frozen, in eval mode. Its states do not fit in float16, so bfloat16 replaces that."""
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    model = load_frozen(source, partial(build_qwen, source.config), dtype=dtype, device=device)
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    with torch.device(device):
        model.rotary_emb = Qwen2_5_VLRotaryEmbedding(model.config)
    return model


def load_in_fp8(source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Load the encoder with its weights in scaled fp8; it is read on the host and converted layer by layer."""
    if device == "meta":
        return load_qwen(source, dtype=dtype, device=device)
    return store_weights(load_qwen(source, dtype=dtype, device="cpu"), "fp8", torch.device(device))


# ---- text ----


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer from the folder of its files.

    Raises:
        UserError: the files are damaged or of another tokenizer.
    """
    from transformers import Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(folder))
        count = len(tokenizer(SYSTEM).input_ids)
    except Exception as error:  # damaged files raise many kinds of errors
        raise UserError(f"{folder}: Qwen2.5-VL's tokenizer cannot be read ({error!r}); download it again") from None
    if count != START:
        raise UserError(
            f"{folder}: not the tokenizer of Qwen2.5-VL (HunyuanImage's instruction has {count} tokens, not {START}); "
            f"give the files of {TOKENIZER[0]}"
        )
    return tokenizer


def token_ids(tokenizer: Any, caption: str) -> list[int]:
    """Return the tokens of the whole conversation, of which the caption has at most ``LENGTH``."""
    return token_rows.token_ids(tokenizer, f"{SYSTEM}{caption}{END}")[: START + LENGTH]


def caption_length(tokenizer: Any, caption: str) -> CaptionLength:
    """Return the number of tokens of a caption, and the text that is cut off."""
    return token_rows.length_of(tokenizer, caption, LENGTH)


def encode(encoder: nn.Module, ids: Tensor) -> Tensor:
    """Encode the tokens of one conversation (1, START + T) to the caption's states (1, T, D).

    It needs no mask, because each token attends to those before it only, and it computes in its own dtype.
    """
    with torch.autocast(ids.device.type, enabled=False):
        return encoder(input_ids=ids, use_cache=False).last_hidden_state[:, START:]
