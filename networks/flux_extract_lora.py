"""Extract a LoRA from the difference between two FLUX.1 or Chroma models.

    python networks/flux_extract_lora.py --model_org flux1-dev.safetensors --model_tuned tuned.safetensors \\
        --save_to difference.safetensors --dim 32 --device cuda --save_precision bf16 --mem_eff_safe_open

For every linear layer of the blocks, the change of its weight is approximated with rank --dim, by singular value
decomposition; alpha is the rank. The file loads like one trained with networks.lora_flux. Both models are read tensor
by tensor, so that only the LoRA and a few tensors are in memory. Single files in the published layout and diffusers
folders are accepted. A GPU (--device cuda) is many times as fast as the CPU.

Text encoders and biases are not extracted. More: docs/flux_tools.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import add_mapped_option, tool_parser
from library.errors import UserError, exits_on_user_error

if TYPE_CHECKING:
    from library.architectures.common.sharded_file import ShardedFile
    from library.architectures.flux.diffusers_layout import DiffusersTransformer

logger = logging.getLogger(__name__)

_BLOCKS = ("lora_unet_double_blocks_", "lora_unet_single_blocks_")


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--model_org", required=True, metavar="FILE", help="the model before")
    add("--model_tuned", required=True, metavar="FILE", help="the model after: the LoRA turns the first into it")
    add("--save_to", required=True, metavar="FILE", help="the LoRA to write")
    add("--dim", type=int, default=4, metavar="N", help="its rank (default 4)")
    add("--device", metavar="DEVICE", help="device of the computation, such as cuda; the CPU if not given")
    add(
        "--clamp_quantile",
        type=float,
        default=0.99,
        metavar="Q",
        help="cut numbers beyond plus or minus this quantile of a module's numbers (default 0.99); 1 cuts none, which "
        "is nearest to the difference",
    )
    add(
        "--save_precision",
        choices=[None, "float", "fp16", "bf16"],
        metavar="TYPE",
        help="precision of the saved file: float, fp16 or bf16; float if not given",
    )
    add_mapped_option(parser, "--mem_eff_safe_open")
    add("--no_metadata", action="store_true", help="write no modelspec.* entries, only those that loaders need")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then extract.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    if args.dim < 1:
        raise UserError(f"--dim {args.dim}: the rank is at least 1")
    if not 0 < args.clamp_quantile <= 1:
        raise UserError(f"--clamp_quantile {args.clamp_quantile}: is between 0 and 1; 1 cuts nothing")
    # only now, as torch takes seconds to load
    from dataclasses import replace

    import torch
    from torch import Tensor

    from library.architectures.flux.diffusers_layout import open_transformer, variant_of
    from library.architectures.flux.published_file import adapter_metadata
    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, parse_precision
    from library.files.streamed import check_target
    from library.training.work_progress import WorkProgress
    from networks.svd_extraction import low_rank
    from networks.weights import write_weights

    target = Path(args.save_to)
    models = [Path(args.model_org), Path(args.model_tuned)]
    check_target(target, "--save_to", sources=models)
    if models[0].resolve() == models[1].resolve():
        raise UserError(f"--model_org and --model_tuned are both {models[0]}; nothing to extract")
    device = parse_device("--device", args.device or "cpu")
    dtype = parse_precision("--save_precision", args.save_precision or "float", COMPUTE)
    before, after = (replace(open_transformer(path), mapped=args.mem_eff_safe_open) for path in models)
    check_target(target, "--save_to", sources=before.files | after.files)
    variant = variant_of(before)
    modules = list(_common_modules(before, after))
    logger.info("%s, %d modules, rank %d", variant.title, len(modules), args.dim)
    found: dict[str, Tensor] = {}
    has_changed = False
    with (
        WorkProgress("extracting", "modules", simple=False) as progress,
        before.opened() as read_before,
        after.opened() as read_after,
    ):
        for done, (name, old, new) in enumerate(modules, start=1):
            change = read_after(new).to(device=device, dtype=torch.float32, copy=True)
            change -= read_before(old).to(device=device).to(torch.float32)
            if not bool(torch.isfinite(change).all()):
                raise UserError(f"{args.model_tuned}: {new} differs from the other model by values that are not finite")
            has_changed = has_changed or bool(change.any())
            up, down = low_rank(change, args.dim, clamp_quantile=args.clamp_quantile)
            found[f"{name}.lora_down.weight"] = down.to(device="cpu", dtype=dtype)
            found[f"{name}.lora_up.weight"] = up.to(device="cpu", dtype=dtype)
            found[f"{name}.alpha"] = torch.tensor(float(down.shape[0]), dtype=dtype)
            progress.update(done, len(modules))
    if not has_changed:
        raise UserError(f"{args.model_tuned}: the blocks' weights equal those of {args.model_org}; nothing to extract")
    ranks = {tensor.shape[0] for key, tensor in found.items() if key.endswith(".lora_down.weight")}
    rank = ranks.pop() if len(ranks) == 1 else None
    metadata = adapter_metadata(
        variant.kind, rank=rank, alpha=rank, title=target.stem, merged_from=None, modelspec=not args.no_metadata
    )
    write_weights(target, found, None, metadata)
    logger.info("saved: %s", target)


def _common_modules(
    before: ShardedFile | DiffusersTransformer, after: ShardedFile | DiffusersTransformer
) -> Iterator[tuple[str, str, str]]:
    """Yield Yield (adapter's name, weight in the first model, weight in the second) of the blocks' linear layers.

    Raises:
        UserError: the models differ in kind or size.
    """
    from networks.model_keys import TRANSFORMER

    def block_keys(model: ShardedFile | DiffusersTransformer) -> dict[str, str]:
        keys = TRANSFORMER.lora_keys(model.shapes, model.path)
        return {n: key for n, key in keys.items() if n.startswith(_BLOCKS) and len(model.shapes[key]) == 2}

    old_keys, new_keys = block_keys(before), block_keys(after)
    if unmatched := sorted(old_keys.keys() ^ new_keys.keys()):
        name = unmatched[0]
        lacking, having = (after, before) if name in old_keys else (before, after)
        raise UserError(
            f"{lacking.path}: has no weight for {name}, which {having.path} has; the models are of different kinds"
        )
    for name, old in old_keys.items():
        new = new_keys[name]
        if before.shapes[old] != after.shapes[new]:
            raise UserError(
                f"{after.path}: {new} is {list(after.shapes[new])}, in {before.path} {list(before.shapes[old])}; "
                "the models are of different sizes"
            )
        yield name, old, new


if __name__ == "__main__":
    main(setup_parser().parse_args())
