"""Adapter files (``file;strength``) for models that are loaded at different times: first text encoders, then the rest.

The network module that reads a file is recognized from the file's tensors.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.lora_target import LORA_TARGET, LoraTarget
from library.errors import UserError, did_you_mean
from library.memory.placing import move
from networks.adapter_module import AdapterModule, merge_all_forever
from networks.third_party import text_argument
from networks.weights import read_weights

logger = logging.getLogger(__name__)

_KINDS = "LoRA and OFT files are read here"
#: network modules that adapt U-Nets, LoRA first
_FOR_UNETS = ("networks.lora", "networks.oft")
#: a piece of a tensor's name -> the kind of an unsupported file, and what to do
_UNREAD = {
    ".hada_w": f"a LoHa of LyCORIS; {_KINDS}",
    ".lokr_w": f"a LoKr of LyCORIS; {_KINDS}",
    ".oft_diag": f"an OFT of LyCORIS; {_KINDS}",
    "lllite_unet_": f"a ControlNet-LLLite; {_KINDS}",
    "double_blocks.0.img_attn.norm.query_norm.scale": f"a whole transformer; {_KINDS}",
}


@dataclass(frozen=True)
class AdapterFile:
    """One checked file.

    Attributes:
        weights: by published names, on the host.
        module: the network module that reads them.
    """

    path: Path
    strength: float
    weights: Mapping[str, Tensor]
    module: Any
    adapts_text: bool
    adapts_denoiser: bool


def read_choice(text: str, flag: str) -> tuple[Path, float]:
    """Parse ``file;0.8``: the file and its strength, 1 if it is not given.

    Raises:
        UserError: no such file, or no number after the semicolon.
    """
    path, semicolon, number = text.rpartition(";")
    if not semicolon or Path(text).is_file():
        path, number = text, "1"
    try:
        strength = float(number)
    except ValueError:
        strength = float("nan")
    if not abs(strength) < float("inf"):
        raise UserError(f'{flag} {text}: "{number}" is no strength; write the file, a semicolon and a number')
    if not Path(path).is_file():
        siblings = [entry.name for entry in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
        raise UserError(f"{flag} {path}: no such file{did_you_mean(Path(path).name, siblings)}")
    return Path(path), strength


def open_adapters(
    choices: Sequence[tuple[Path, float]],
    text_encoders: Sequence[nn.Module],
    denoiser: nn.Module,
    *,
    patterns: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> list[AdapterFile]:
    """Read the files and check them against the models.

    Args:
        patterns: regular expressions: only tensors whose names have a match of one of the first are used, if there are
            any, and none with a match of one of the second.
        text_encoders, denoiser: with their ``LoraTarget``; best on the meta device, because only names and shapes are
        used.

    Raises:
        UserError: a file is no adapter, or is for other models.
    """
    opened = []
    target: LoraTarget = getattr(denoiser, LORA_TARGET)
    for path, strength in choices:
        weights = _chosen(read_weights(path), path, *patterns)
        module = importlib.import_module(_module_for(weights, target, path))
        network, weights = module.create_network_from_weights(
            strength, str(path), None, text_argument(text_encoders), denoiser, weights_sd=weights, for_inference=True
        )
        adapts_text, adapts_denoiser = bool(network.text_encoder_loras), bool(network.unet_loras)
        opened.append(AdapterFile(path, strength, weights, module, adapts_text, adapts_denoiser))
    return opened


def _chosen(
    weights: Mapping[str, Tensor], path: Path, include: Sequence[str], exclude: Sequence[str]
) -> Mapping[str, Tensor]:
    """Return the tensors whose names the patterns choose. Raises UserError: none is left."""
    found = {
        name: tensor
        for name, tensor in weights.items()
        if (not include or any(re.search(pattern, name) for pattern in include))
        and not any(re.search(pattern, name) for pattern in exclude)
    }
    if weights and not found:
        raise UserError(f"{path}: --include_patterns and --exclude_patterns leave none of its {len(weights)} tensors")
    return found


def _module_for(weights: Mapping[str, Tensor], target: LoraTarget, path: Path) -> str:
    for piece, kind in _UNREAD.items():
        if any(piece in name for name in weights):
            raise UserError(f"{path}: {kind}")
    is_oft = any(".oft_blocks" in name for name in weights)
    lora, *others = target.network_modules or _FOR_UNETS
    return next((name for name in others if is_oft and "oft" in name), lora)


def adapt(
    files: Sequence[AdapterFile],
    strengths: Sequence[float],
    text_encoders: Sequence[nn.Module],
    denoiser: nn.Module,
    *,
    text: bool,
    merge: bool,
    device: torch.device,
) -> list[nn.Module | None]:
    """Apply the files to the text encoders or to the denoiser; the others may be on the meta device.

    Args:
        strengths: one for each file.
        text: whether to adapt the text encoders.
        merge: merge them into the weights instead.

    Returns:
        A network for each file; None where it adapts nothing of these models, or is merged.
    """
    applied: list[nn.Module | None] = []
    merged: list[AdapterModule] = []
    encoders = text_argument(text_encoders)
    for file, strength in zip(files, strengths, strict=True):
        applied.append(None)
        if not (file.adapts_text if text else file.adapts_denoiser):
            continue
        network, _ = file.module.create_network_from_weights(
            strength, str(file.path), None, encoders, denoiser, weights_sd=file.weights, for_inference=True
        )
        own = network.text_encoder_loras if text else network.unet_loras
        what = "text encoders" if text else "denoiser"
        if merge:
            network.load_state_dict(file.weights, strict=False)
            merged += [move(adapter, device) for adapter in own]
            logger.info("merging %s into the %s: strength %g, %d modules", file.path, what, strength, len(own))
            continue
        network.apply_to(encoders, denoiser, text, not text)
        network.load_state_dict(file.weights, strict=False)
        for adapter in own:
            move(adapter, device, adapter.original.weight.dtype)
        logger.info("applied %s to the %s: strength %g, %d modules", file.path, what, strength, len(own))
        applied[-1] = network.eval()
    merge_all_forever(merged, device)
    return applied
