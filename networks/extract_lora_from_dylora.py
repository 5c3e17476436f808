"""Extract LoRAs of smaller ranks from a DyLoRA.

    python networks/extract_lora_from_dylora.py --model my_dylora.safetensors --save_to my_lora.safetensors --unit 4

The first k ranks of a DyLoRA are a LoRA of rank k with the same alpha (networks/dylora.py). One file is written for
each multiple of --unit up to the whole rank: my_lora-0004.safetensors, my_lora-0008.safetensors, ... Each is for
networks.lora and every other program that reads LoRA.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_SDXL_UNET = "lora_unet_input_blocks_"


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", default=None, help="DyLoRA file")
    parser.add_argument("--save_to", default=None, help="files to write, without the rank: lora.safetensors")
    parser.add_argument("--unit", type=int, default=None, help="step of the ranks (that of training, if not given)")
    return parser


def first_ranks(weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file cut to its first ranks; modules with fewer ranks are unchanged. Alphas stay."""
    cut = {}
    for name, tensor in weights.items():
        if name.endswith(".lora_down.weight"):
            tensor = tensor[:rank]
        elif name.endswith(".lora_up.weight"):
            tensor = tensor[:, :rank]
        cut[name] = tensor
    return cut


def extract(model: Path, save_to: Path, unit: int | None) -> list[Path]:
    """Write a LoRA for each multiple of ``unit`` up to the rank of ``model``; returns the files.

    Raises:
        UserError: no DyLoRA, a wrong unit, or files that cannot be read or written.
    """
    # only now, as torch takes seconds to load
    import torch

    from library.files.safetensors_io import PICKLE_SUFFIXES, is_pickle, read_header
    from library.files.streamed import check_target
    from networks.dylora import MODULE_NAME
    from networks.weights import read_weights, sizes_of, write_weights

    check_target(save_to, "--save_to", suffixes=(".safetensors", *PICKLE_SUFFIXES))
    weights = read_weights(model)
    metadata = {} if is_pickle(model) else read_header(model).metadata
    made_by = metadata.get("ss_network_module", MODULE_NAME)
    if made_by != MODULE_NAME:
        raise UserError(f"--model {model}: it was trained as {made_by}; only the ranks of a DyLoRA stand by themselves")
    sizes = sizes_of(weights)
    if not sizes:
        raise UserError(f"--model {model}: holds no lora_down tensors, so it is no DyLoRA")
    if not metadata:
        logger.warning("%s does not say how it was trained; it is taken for a DyLoRA", model)
    named = with_sdxl_encoder_named(weights)
    arguments = _network_args(metadata)
    whole = max(size.rank for size in sizes.values())
    unit = _unit(unit, arguments, whole)
    # without an alpha, readers use the rank, which changes with the cut
    alphas = {f"{name}.alpha": torch.tensor(size.alpha) for name, size in sizes_of(named).items()}
    weights = {**alphas, **named}
    ranks = range(unit, whole + 1, unit)
    files = [save_to.with_name(f"{save_to.stem}-{rank:04d}{save_to.suffix}") for rank in ranks]
    for file in files:
        check_target(file, "--save_to", sources=[model], suffixes=[save_to.suffix])
    for rank, file in zip(ranks, files, strict=True):
        write_weights(file, first_ranks(weights, rank), None, _metadata_of(metadata, arguments, whole, rank))
        logger.info("saved rank %d: %s", rank, file)
    return files


def with_sdxl_encoder_named(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename the text encoder in old files of SDXL, which hold only the second one, under the name of both."""
    from networks.dylora import OLD_TEXT_PREFIX

    if not any(name.startswith(_SDXL_UNET) for name in weights):
        return weights
    renamed = {
        f"lora_te2_{name.removeprefix(OLD_TEXT_PREFIX)}" if name.startswith(OLD_TEXT_PREFIX) else name: tensor
        for name, tensor in weights.items()
    }
    if renamed.keys() != weights.keys():
        logger.warning(
            "an old DyLoRA file of SDXL, in which text encoder 2 has overwritten text encoder 1: its modules are named "
            "lora_te2"
        )
    return renamed


def _unit(given: int | None, arguments: Mapping[str, object], rank: int) -> int:
    unit = given if given is not None else int(str(arguments.get("unit", 1)))
    if not 1 <= unit <= rank:
        raise UserError(f"--unit {unit}: must be from 1 to the rank of the file, {rank}")
    return unit


def _network_args(metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _metadata_of(metadata: Mapping[str, str], arguments: Mapping[str, object], whole: int, rank: int) -> dict[str, str]:
    """Return the metadata of the whole file, for a plain LoRA; hashes are computed when it is written."""
    from networks.lora_args import MODULE_NAME

    comment = f"split from DyLoRA, rank {whole} to {rank}; {metadata.get('ss_training_comment', '')}"
    entries = {
        **metadata,
        "ss_network_module": MODULE_NAME,
        "ss_network_dim": str(rank),
        "ss_training_comment": comment,
    }
    kept = {name: value for name, value in arguments.items() if name != "unit"}
    if kept.get("conv_dim") is not None:
        kept["conv_dim"] = str(rank)
    if "ss_network_args" in entries:
        entries["ss_network_args"] = json.dumps(kept)
    return entries


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    setup_console(ConsoleOptions(console_log_simple=True))
    for flag in ("model", "save_to"):
        if getattr(args, flag) is None:
            raise UserError(f"--{flag}: is required")
    extract(Path(args.model), Path(args.save_to), args.unit)


if __name__ == "__main__":
    main(setup_parser().parse_args())
