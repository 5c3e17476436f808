"""Translate adapter tensors with diffusers' and PEFT's names to the published names.

Published files name a module by its path with underscores, below a prefix: ``lora_unet_input_blocks_4_1_proj_in``.
Others hold the same tensors as

* ``lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight``: published, with diffusers' module names;
* ``unet.down_blocks.1.attentions.0.proj_in.lora_A.weight`` (diffusers and PEFT), for text encoders
  ``text_encoder.`` or ``text_encoder_2.``, with or without the level ``text_model.``;
* the same with ``.lora.down.weight`` or ``.lora_linear_layer.down.weight`` (diffusers before PEFT);
* published names with other endings, where another program calls a family's layers otherwise (``other_endings``).

PEFT's alphas are in the metadata, as JSON under ``lora_adapter_metadata``; without them alpha is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.adapters import PEFT_ROOT
from library.architectures.lora_target import LoraTarget
from library.errors import UserError
from networks.targets import find_modules

ADAPTER_METADATA = "lora_adapter_metadata"

#: a tensor's name below its module in any program -> the published one
TENSOR_NAMES = {
    "lora_down.weight": "lora_down.weight",
    "lora_up.weight": "lora_up.weight",
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "oft_blocks": "oft_blocks",
}
_KEY = re.compile(rf"(.+?)\.({'|'.join(re.escape(name) for name in TENSOR_NAMES)})")


def published_names(weights: Mapping[str, Tensor], models: Iterable[tuple[nn.Module, LoraTarget]]) -> dict[str, Tensor]:
    """Return ``weights`` under the names of networks on these models; unknown names are kept."""
    names = {alias: name for model, target in models for alias, name in _aliases(model, target)}
    renamed = {}
    for key, tensor in weights.items():
        found = _KEY.fullmatch(key)
        name = names.get(found[1].removeprefix(PEFT_ROOT)) if found else None
        renamed[f"{name}.{TENSOR_NAMES[found[2]]}" if found and name else key] = tensor
    return renamed


def _aliases(model: nn.Module, target: LoraTarget) -> Iterator[tuple[str, str]]:
    """Yield (other name, published name) of every module that may carry an adapter."""
    for found in find_modules(model, target.with_convs()):
        yield f"{target.prefix}_{found.published_path.replace('.', '_')}", found.lora_name
        yield f"{target.diffusers_root}.{found.published_path}", found.lora_name
        yield f"{target.diffusers_root}.{found.published_path.removeprefix('text_model.')}", found.lora_name
        for other, own in target.other_endings:
            if found.lora_name.endswith(f"_{own}"):
                yield f"{found.lora_name.removesuffix(own)}{other}", found.lora_name


def with_alphas(weights: dict[str, Tensor], metadata: Mapping[str, str], title: str) -> dict[str, Tensor]:
    """Return ``weights`` in PEFT's names with the alphas from the metadata of the file ``title``.

    Raises:
        UserError: they are invalid, so the adapter's strength is unknown.
    """
    try:
        return {**weights, **_alphas(weights, json.loads(metadata.get(ADAPTER_METADATA, "{}")))}
    except (ValueError, TypeError, AttributeError, re.error):
        raise UserError(f"{title}: its metadata {ADAPTER_METADATA}, which tell the alphas, are damaged") from None


def _alphas(weights: Mapping[str, Tensor], adapter_metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    alphas: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        module, ending, _ = key.partition(".lora_A.")
        root, _, path = module.partition(".")
        alpha = adapter_metadata.get(f"{root}.lora_alpha") if ending else None
        if alpha is None:
            continue
        for pattern, own in (adapter_metadata.get(f"{root}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                alpha = own
                break
        rank = tensor.shape[0]
        # PEFT's rank-stabilized factor is alpha / sqrt(rank); our files have alpha / rank
        scaled = alpha * math.sqrt(rank) if adapter_metadata.get(f"{root}.use_rslora") else alpha
        alphas[f"{module}.alpha"] = torch.tensor(float(scaled))
    return alphas
