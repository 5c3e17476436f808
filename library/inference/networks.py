"""Apply additional networks (LoRA and the like) for generating, through the public network protocol."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.errors import UserError
from library.files.safetensors_io import is_pickle, load_pickle, read_header
from library.inference.models import ImageModels
from library.memory.placing import move
from networks.merge_together import Merged, merge_together
from networks.module_names import import_network_module
from networks.third_party import denoiser_argument, refuse_wrong_merge, text_argument

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkChoice:
    """One network of the command line."""

    module: str  # importable name, e.g. networks.lora
    weights: str  # file
    multiplier: float
    arguments: dict[str, str]


def choose_networks(
    modules: Sequence[str] | None,
    weights: Sequence[str] | None,
    multipliers: Sequence[float] | None,
    arguments: Sequence[str] | None,
) -> list[NetworkChoice]:
    """Pair the i-th module with the i-th weights, multiplier (or 1) and arguments (or none).

    Raises:
        UserError: the numbers do not fit, a file is missing, arguments are not ``key=value,key=value``.
    """
    modules, weights = list(modules or []), list(weights or [])
    multipliers = list(multipliers or [])
    read = [_read_arguments(text) for text in arguments or []]
    for path in weights:
        if not Path(path).is_file():
            raise UserError(f"--network_weights: {path}: no such file")
    if weights and not modules:
        modules = [module_of_file(Path(path)) for path in weights]
    if len(weights) != len(modules):
        raise UserError(
            f"--network_weights: {len(weights)} files for {len(modules)} networks of --network_module; "
            "give one file for each, or no module, which the files then tell"
        )
    for flag, values in (("--network_mul", multipliers), ("--network_args", read)):
        if len(values) > len(modules):
            raise UserError(f"{flag}: {len(values)} values for {len(modules)} networks of --network_module")
    for multiplier in multipliers:
        if not math.isfinite(multiplier):
            raise UserError(f"--network_mul {multiplier}: a strength must be a finite number")
    multipliers += [1.0] * (len(modules) - len(multipliers))
    read += [{} for _ in modules[len(read) :]]
    return [
        NetworkChoice(module, path, multiplier, values)
        for module, path, multiplier, values in zip(modules, weights, multipliers, read, strict=True)
    ]


#: piece of a tensor's name -> module that reads such files
_MODULE_BY_NAME = {".oft_blocks": "networks.oft", ".hada_w": "lycoris.kohya", ".lokr_w": "lycoris.kohya"}


def module_of_file(path: Path) -> str:
    """Return the network module that a file names in its metadata, else the one that its tensors' names suggest.

    Raises:
        UserError: the file cannot be read.
    """
    header = None if is_pickle(path) else read_header(path)
    module = header.metadata.get("ss_network_module", "") if header is not None else ""
    if not re.fullmatch(r"(networks|lycoris)(\.\w+)+", module):
        names = header.tensors if header is not None else load_pickle(path)
        suggested = (m for piece, m in _MODULE_BY_NAME.items() if any(piece in name for name in names))
        module = next(suggested, "networks.lora")
    logger.info("network module of %s: %s, as its file says", path, module)
    return module


def _read_arguments(text: str) -> dict[str, str]:
    read: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.replace(";", ",").split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UserError(f'--network_args: "{part}" is not key=value; several are joined with commas')
        name, value = name.strip(), value.strip()
        if (before := read.setdefault(name, value)) != value:
            raise UserError(f"--network_args: {name} is given as {before!r} and as {value!r}; give it once")
    return read


def apply_networks(
    choices: Sequence[NetworkChoice],
    models: ImageModels,
    *,
    merge: bool | int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[nn.Module]:
    """Create the networks and apply them to the models, or merge them in.

    Args:
        merge: whether all are merged, or how many of the first are.

    Returns:
        the applied networks, in order; none when merged.

    Raises:
        UserError: module missing or without the protocol, weights that fit no module.
    """
    text = text_argument(models.text_encoders)
    applied: list[nn.Module] = []
    to_merge: list[Merged] = []
    count = (len(choices) if merge else 0) if isinstance(merge, bool) else merge
    for place, choice in enumerate(choices):
        if place == count:  # the others are applied to the model that those before made
            merge_together(to_merge, text, dtype=dtype, device=device)
            to_merge = []
        module = import_network_module(choice.module, "create_network_from_weights")
        denoiser = denoiser_argument(choice.module, models.denoiser)
        network, weights = module.create_network_from_weights(
            choice.multiplier, choice.weights, models.vae, text, denoiser, for_inference=True, **choice.arguments
        )
        if place < count:
            refuse_wrong_merge(choice.module, network, weights, choice.multiplier)
            to_merge.append(Merged(network, weights, denoiser))
            logger.info("merging %s with multiplier %g", choice.weights, choice.multiplier)
            continue
        network.apply_to(text, denoiser, True, True)
        loaded = network.load_state_dict(weights, strict=False)
        if loaded.unexpected_keys:
            logger.warning(
                "%s: %d tensors fit no module of this model, the first is %s",
                choice.weights,
                len(loaded.unexpected_keys),
                loaded.unexpected_keys[0],
            )
        move(network, device, dtype).eval()
        logger.info("applied %s with multiplier %g", choice.weights, choice.multiplier)
        applied.append(network)
    merge_together(to_merge, text, dtype=dtype, device=device)
    return applied


def set_multipliers(models: ImageModels, multipliers: Sequence[float], *, merges_each: bool) -> None:
    """Set the strengths of the applied networks.

    Args:
        merges_each: merge them into the models' weights with these strengths, and what was merged before out of them.
    """
    able = [network for network in models.adapters if merges_each and hasattr(network, "pre_calculation")]
    for network in reversed(able):
        network.restore_weights()
    for network, multiplier in zip(models.adapters, multipliers, strict=True):
        network.set_multiplier(multiplier)
    for network in able:
        network.backup_weights()
        network.pre_calculation()
    if merges_each and len(able) < len(models.adapters):
        logger.warning("--network_pre_calc: not all networks can be merged; the others are applied as usual")
