"""The table that describes the LoRAs of a family of transformers; its network module is made from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from library.architectures.lora_target import LoraTarget


@dataclass(frozen=True)
class BlockList:
    """One list of blocks.

    Attributes:
        kind: for messages and for ``LoraTable.choices``.
        path: of modules in it; the first group is the block's number.
        key: the network arg that chooses blocks by number; "" for none.
        also: further modules, adapted unless the whole list is left out.
    """

    kind: str
    path: re.Pattern[str]
    key: str = ""
    also: re.Pattern[str] | None = None


@dataclass(frozen=True)
class LoraTable:
    """The network args that a family's LoRA has beside those of ``networks.lora``.

    Attributes:
        title: of the model, for messages.
        denoiser: the target of a transformer that no family has loaded.
        encoder_target: the same of a text encoder.
        layers: keys that give a rank to one kind of layer -> its modules' paths; the first that matches wins.
        instead: which keys there are instead of those that count the blocks of a U-Net, for messages.
        blocks: the lists of blocks.
        choice_key: the key that trains some of these lists only; "" for none.
        choices: its values, beside ``all`` -> kinds of the lists.
        embedders: modules that have no LoRA unless ``embedders_key`` gives them a rank, in its order.
        encoders: keys that have to be true for a text encoder to be adapted -> prefix of its target.
        splits: whether there is ``split_qkv``, for layers of several projections.
        perturbs: whether there are ``ggpo_sigma`` and ``ggpo_beta``.
    """

    title: str
    denoiser: LoraTarget
    encoder_target: Callable[[nn.Module], LoraTarget]
    layers: Mapping[str, re.Pattern[str]]
    instead: str
    blocks: tuple[BlockList, ...] = ()
    choice_key: str = ""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    embedders_key: str = ""
    embedders: tuple[str, ...] = ()
    encoders: Mapping[str, str] = field(default_factory=dict)
    splits: bool = True
    perturbs: bool = True
