"""Writes the tables of recorded and planned memory in docs/memory.md: python tests/memory/table.py

The first comes from the recorded traces beside this file. The second takes the first choice of ``--memory_plan`` that
fits each size of GPU, with the sizes of the published models.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
_GB = 2**30
#: case of ``traced_steps.py`` without checkpointing, or None -> with it, and the name of the model
ROWS: dict[str, tuple[str | None, str | None]] = {
    "Stable Diffusion 1.5": ("sd", "sd_checkpointed"),
    "SDXL": ("sdxl", "sdxl_checkpointed"),
    "Stable Diffusion 3 medium": (None, "sd3"),
    "Stable Diffusion 3.5 large": (None, "sd35"),
    "Lumina-Image 2.0": (None, "lumina"),
    "FLUX.1": ("flux_kept", "flux"),
    "Chroma": (None, "chroma"),
    "HunyuanImage-2.1": (None, "hunyuan_image"),
}
#: model -> case of ``traced_full.py``, and its options
WHOLE = {
    "SDXL, U-Net": ("sdxl", "`--fused_backward_pass`"),
    "FLUX.1": ("flux", "`--blockwise_fused_optimizers --blocks_to_swap 35`"),
    "Chroma": ("chroma", "`--blockwise_fused_optimizers --blocks_to_swap 35`"),
    "Stable Diffusion 3 medium": ("sd3", "`--blockwise_fused_optimizers`"),
    "Stable Diffusion 3.5 large": ("sd35", "`--blockwise_fused_optimizers --blocks_to_swap 36`"),
    "Lumina-Image 2.0": ("lumina", "`--blockwise_fused_optimizers --blocks_to_swap 24`"),
    "HunyuanImage-2.1, 2048 px": ("hunyuan_image", "`--blockwise_fused_optimizers --blocks_to_swap 37`"),
}
SWAPPED = (0, 18, 26, 35)
GPUS = (8, 10, 12, 16, 24, 48)
FLAGS = {"fp8": "--fp8_base_unet"}


def recorded(name: str) -> dict[str, dict[str, int]]:
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def gb(count: int) -> str:
    return f"{count / _GB:.1f} GB"


def recorded_table() -> list[str]:
    """Return the rows of adapters: weights and peaks of a step."""
    from tests.fixtures.traced_steps import CASES

    steps = recorded("recorded_steps.json")
    lines = [
        "| model | images | weights | without checkpointing | `--gradient_checkpointing` |",
        "|---|---|---|---|---|",
    ]
    for model, names in ROWS.items():
        kept, checkpointed = (steps.get(name or "") for name in names)
        known = kept or checkpointed
        assert known is not None
        size = CASES[next(name for name in names if name)].size
        peaks = (gb(found["peak"]) if found else "" for found in (kept, checkpointed))
        lines.append(f"| {model} | {size} px | {gb(known['resident'])} | {' | '.join(peaks)} |")
    return lines


def whole_table() -> list[str]:
    """Return the rows of whole models."""
    steps = recorded("recorded_full_steps.json")
    lines = ["| model | options | GPU | of which weights |", "|---|---|---|---|"]
    for model, (name, options) in WHOLE.items():
        if name not in steps:
            continue
        lines.append(f"| {model} | {options} | {gb(steps[name]['peak'])} | {gb(steps[name]['resident'])} |")
    return lines


def planned_table() -> list[str]:
    """Return the rows of models: for each GPU the first choice that fits, and its peak."""
    from library.training.memory_choice import _GAPS, _OF_CUDA

    sizes = [f"{size} GB" for size in GPUS]
    lines = [f"| model | {' | '.join(sizes)} |", "|---" * (len(GPUS) + 1) + "|"]
    for model, names in ROWS.items():
        plans, cells = plans_of(*names), []
        for size in GPUS:
            usable = size * _GB * (1 - _GAPS) - _OF_CUDA
            fitting = next((plan for plan in plans if plan[1] <= usable), None)
            cells.append("no" if fitting is None else f"{fitting[0]}: {gb(fitting[1])}")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


@cache
def model_and_blocks(name: str) -> tuple[Any, Any]:
    """Return the denoiser of a case without weights, and its lists of blocks."""
    from tests.fixtures.traced_steps import CASES, family_of, on_meta

    model = on_meta(CASES[name], short=False)
    return model, family_of(CASES[name]).block_lists(model)


def plans_of(kept: str | None, checkpointed: str | None) -> list[tuple[str, int]]:
    """Return options and peaks of a model's choices, from the cheapest to the dearest."""
    from library.memory.budget import Choice, choices, denoiser_bytes, most_swapped

    steps = recorded("recorded_steps.json")
    model, blocks = model_and_blocks(checkpointed or kept or "")
    whole = denoiser_bytes(model, (), Choice(False))
    found = []
    for choice in choices(
        checkpointing=False, forms=[None, "fp8"], most_swapped=most_swapped(blocks), swapped=0, small_states=[False]
    ):
        step = steps.get((checkpointed if choice.checkpointing else kept) or "")
        if step is not None:
            total = step["peak"] - whole + denoiser_bytes(model, blocks, choice)
            words = choice.describe(FLAGS)
            found.append((f"`{words}`" if words.startswith("--") else words, total))
    return found


#: what the predecessor's documents say of the GPU: run, GB, case, whole model, form of its weights, swapped blocks
PUBLISHED: list[tuple[str, str, str, bool, str | None, int]] = [
    (
        "SDXL LoRA, rank 4 to 8, 8-bit optimizer, checkpointing",
        "8; 10 recommended",
        "sdxl_checkpointed",
        False,
        None,
        0,
    ),
    ("SDXL, float32, `--fused_backward_pass`", "about 17", "sdxl_float32", True, None, 0),
    ("FLUX.1 LoRA, `--fp8_base`, batch size 2", "24", "flux", False, "fp8", 0),
    ("FLUX.1 LoRA, `--fp8_base --blocks_to_swap 16`, 8-bit optimizer", "12", "flux", False, "fp8", 16),
    ("FLUX.1 LoRA, `--fp8_base --blocks_to_swap 22`", "10", "flux", False, "fp8", 22),
    ("FLUX.1 LoRA, `--fp8_base --blocks_to_swap 28`", "8", "flux", False, "fp8", 28),
    ("FLUX.1, `--full_bf16 --blocks_to_swap 8`", "24", "flux", True, None, 8),
    ("FLUX.1, `--full_bf16 --blocks_to_swap 28`", "12", "flux", True, None, 28),
    ("HunyuanImage-2.1 LoRA", "40", "hunyuan_image", False, None, 0),
    ("HunyuanImage-2.1 LoRA, `--fp8_scaled --blocks_to_swap 9`", "24", "hunyuan_image", False, "fp8_scaled", 9),
    ("HunyuanImage-2.1 LoRA, `--fp8_scaled --blocks_to_swap 32`", "12", "hunyuan_image", False, "fp8_scaled", 32),
    ("HunyuanImage-2.1 LoRA, `--fp8_scaled --blocks_to_swap 37`", "8", "hunyuan_image", False, "fp8_scaled", 37),
]


def published_table() -> list[str]:
    """Return the rows of runs whose GPU is published, with our estimates."""
    from library.memory.budget import Choice, denoiser_bytes
    from tests.fixtures.traced_full import FULL

    lines = ["| run | published GPU, GB | estimate |", "|---|---|---|"]
    for run, size, case, is_whole, form, swapped in PUBLISHED:
        steps = recorded("recorded_full_steps.json" if is_whole else "recorded_steps.json")
        if case not in steps:
            continue
        peak = steps[case]["peak"]
        present = FULL[case].swaps if is_whole else 0
        if form is not None or swapped != present:
            model, blocks = model_and_blocks(case)
            peak -= denoiser_bytes(model, blocks, Choice(True, None, present))
            peak += denoiser_bytes(model, blocks, Choice(True, form, swapped))
        lines.append(f"| {run} | {size} | {gb(peak)} |")
    return lines


def swapped_table() -> list[str]:
    """Return the rows of FLUX.1's swapped blocks: peaks, and the weights of blocks that wait on the host."""
    from library.memory.block_stream import spread, swapped_counts
    from library.memory.budget import Choice, denoiser_bytes

    model, blocks = model_and_blocks("flux")
    step = recorded("recorded_steps.json")["flux"]["peak"] - denoiser_bytes(model, (), Choice(True))
    lines = ["| `--blocks_to_swap` | bf16 | `--fp8_base_unet` | host memory in bf16 |", "|---|---|---|---|"]
    for count in SWAPPED:
        peaks = [gb(step + denoiser_bytes(model, blocks, Choice(True, form, count))) for form in (None, "fp8")]
        waiting = 0
        if count:
            for listed, number in zip(blocks, swapped_counts([len(listed) for listed in blocks], count), strict=True):
                places = spread(len(listed), number) if number else []
                waiting += sum(p.nbytes for place in places for p in listed[place].parameters())
        lines.append(f"| {count or 'none'} | {' | '.join(peaks)} | {gb(waiting) if count else ''} |")
    return lines


TABLES = {
    "recorded": recorded_table,
    "swapped": swapped_table,
    "whole": whole_table,
    "planned": planned_table,
    "published": published_table,
}


def written(text: str) -> str:
    """Return the page with its tables made anew."""
    for name, made in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + "\n".join(made()) + "\n" + end + after
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
