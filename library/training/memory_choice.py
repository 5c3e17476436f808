"""``--memory_plan GB`` or ``auto``: trace the run, print what a step takes, and choose options that fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from library.architectures.part import DENOISER, text_encoder_name
from library.config import block_swap
from library.config.arguments import OptimizerOptions, RunOptions
from library.errors import UserError
from library.memory.budget import Choice, Parts, choices, denoiser_bytes, most_swapped
from library.memory.plan import MemoryPlan
from library.optim.optimizers import OptimizerChoice
from library.training.kinds.base import RunSubject
from library.training.loading import make_kind
from library.training.memory import memory_plan
from library.training.memory_trace import TracedRun, state_bytes, trace
from library.training.run import Run

logger = logging.getLogger(__name__)

_GB = 2**30
#: what a CUDA device holds beside torch's tensors, and the part of the budget that the allocator's gaps take
_OF_CUDA, _GAPS = int(0.6 * _GB), 0.05
_FLAGS = {
    "fp8": "--fp8_base_unet",
    "fp8_scaled": "--fp8_scaled",
    "int8": "--quantize_base int8",
    "nf4": "--quantize_base nf4",
}


def planned(run: Run) -> Any:
    """Return the options of the run with those that make it fit.

    Raises:
        UserError: nothing fits; the message says what takes the least.
    """
    options, asked = run.options, run.options.training.memory_plan
    budget, on_gpu = _budget(asked, run.device), for_gpu(options, run.device)
    usable = int(budget * (1 - _GAPS)) - _OF_CUDA if on_gpu else budget
    traces = {True: trace(run, checkpointing=True, host_kernels=not on_gpu)}
    if not options.training.gradient_checkpointing:
        traces[False] = trace(run, checkpointing=False, host_kernels=not on_gpu)
    plan, denoiser = memory_plan(run, make_kind(run)), traces[True].models.denoiser
    blocks = run.architecture.block_lists(denoiser)
    facts = RunSubject(run.kind, run.architecture).facts(options)
    can_swap = run.sharding is None and block_swap.can_swap(options, facts)
    considered = choices(
        checkpointing=options.training.gradient_checkpointing,
        forms=_forms(plan),
        most_swapped=most_swapped(blocks) if can_swap else 0,
        swapped=run.architecture.blocks_to_swap,
        small_states=[False, True] if on_gpu and _takes_small_states(options.optimizer) else [False],
    )
    always = _always_there(plan, traces[True], run.checked.optimizer, encodes_images=not run.caches_latents)
    found = []
    for choice in considered:
        traced = traces[choice.checkpointing]
        lists = run.architecture.block_lists(traced.models.denoiser)
        found.append((choice, _parts(lists, always, traced, choice)))
    chosen = next(((choice, parts) for choice, parts in found if parts.total <= usable), None)
    for line in _table(traces, found, chosen):
        logger.info("%s", line)
    if chosen is None:
        least, parts = min(found, key=lambda pair: pair[1].total)
        raise UserError(
            f"--memory_plan {asked}: a step of this run takes at least "
            f"{_gb(parts.total)} (with {least.describe(_FLAGS)}); of that activations and gradients take "
            f"{_gb(parts.step)}: lower the resolution or train_batch_size, or raise the budget"
        )
    return _with(options, chosen[0])


def for_gpu(options: RunOptions, device: torch.device) -> bool:
    """Return whether the budget is that of a CUDA device: the run's, or the one that a dry run on a CPU asks about."""
    asked = options.config.dry_run and options.training.memory_plan != "auto" and device.type == "cpu"
    return device.type == "cuda" or asked


def _budget(given: str | None, device: torch.device) -> int:
    """Return the bytes of ``--memory_plan``, which is a number of GB or ``auto``."""
    if given is not None and given != "auto":
        return int(float(given) * _GB)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _forms(plan: MemoryPlan) -> list[str | None]:
    """Return the forms of the denoiser's weights to consider."""
    present = plan[DENOISER].form
    return [present] if present is not None or plan[DENOISER].trained else [None, "fp8"]


def _takes_small_states(options: OptimizerOptions) -> bool:
    """Whether AdamW8bit may take the place of the optimizer."""
    plain = not options.optimizer_type or options.optimizer_type.lower() == "adamw"
    return plain and not (options.use_8bit_adam or options.use_lion_optimizer) and find_spec("bitsandbytes") is not None


@dataclass(frozen=True)
class _AlwaysThere:
    """Bytes that no choice changes, and those of the optimizer's states."""

    frozen: int  # text encoders and VAE
    trained: int
    state: int
    small_state: int  # of 8 bits


def _always_there(
    plan: MemoryPlan, traced: TracedRun, optimizer: OptimizerChoice, *, encodes_images: bool
) -> _AlwaysThere:
    models, trained = traced.models, list({id(p): p for p in traced.trained}.values())
    frozen = 0
    for number, encoder in enumerate(models.text_encoders, start=1):
        part = plan[text_encoder_name(number)]
        if part.storage != "cached":
            frozen += denoiser_bytes(encoder, (), Choice(False, part.form)) - _trained_bytes(encoder, trained)
    if models.vae is not None and encodes_images:
        frozen += sum(t.nbytes for t in (*models.vae.parameters(), *models.vae.buffers()))
    numbers = sum(p.numel() for p in trained)
    state = traced.state
    if state is None:
        state = state_bytes(optimizer, numbers, trained[0].dtype)
    return _AlwaysThere(frozen, sum(p.nbytes for p in trained), state, 2 * numbers)


def _trained_bytes(model: nn.Module, trained: Sequence[nn.Parameter]) -> int:
    """Return the bytes of a model's own parameters that are trained."""
    ids = {id(p) for p in trained}
    return sum(p.nbytes for p in model.parameters() if id(p) in ids)


def _parts(blocks: Sequence[Sequence[nn.Module]], always: _AlwaysThere, traced: TracedRun, choice: Choice) -> Parts:
    denoiser = traced.models.denoiser
    kept = denoiser_bytes(denoiser, blocks, choice)
    in_denoiser = _trained_bytes(denoiser, traced.trained)
    # all of a denoiser that waits in part is trained, or nothing of it
    waiting = denoiser_bytes(denoiser, blocks, replace(choice, swapped=0)) - kept if in_denoiser else 0
    frozen = kept + waiting + always.frozen - in_denoiser
    state = always.small_state if choice.small_state else always.state
    return Parts(frozen, always.trained - waiting, state, traced.worst.peak)


def _with(options: Any, choice: Choice) -> Any:
    """Return the options with a choice."""
    training = replace(
        options.training,
        memory_plan=None,
        gradient_checkpointing=choice.checkpointing,
        fp8_base_unet=options.training.fp8_base_unet or choice.form == "fp8" and not options.training.fp8_base,
    )
    options = replace(options, training=training)
    if choice.small_state:
        options = replace(options, optimizer=replace(options.optimizer, optimizer_type="AdamW8bit"))
    return block_swap.with_count(options, choice.swapped) if choice.swapped else options


def _table(
    traces: dict[bool, TracedRun], found: Sequence[tuple[Choice, Parts]], chosen: tuple[Choice, Parts] | None
) -> list[str]:
    lines = ["memory plan: all values are estimates from a traced step"]
    for with_checkpointing, traced in sorted(traces.items()):
        for step in traced.steps:
            how = "with" if with_checkpointing else "without"
            lines.append(
                f"  bucket {step.bucket[0]}x{step.bucket[1]}, batch {step.batch_size}, {how} checkpointing: "
                f"activations and gradients {_gb(step.peak)}, of that gradients {_gb(step.gradients)}"
            )
    lines.append("  weights | trained | optimizer state | step | total | options")
    shown = [found[0], *([chosen] if chosen is not None and chosen != found[0] else []), found[-1]]
    for choice, parts in dict.fromkeys(shown):
        values = " | ".join(map(_gb, (parts.frozen, parts.trained, parts.state, parts.step, parts.total)))
        lines.append(f"  {values} | {choice.describe(_FLAGS)}")
    if chosen is not None:
        lines.append(f"  chosen: {chosen[0].describe(_FLAGS)}, about {_gb(chosen[1].total)}")
    return lines


def _gb(count: int) -> str:
    return f"{count / _GB:.2f} GB" if count >= 0.1 * _GB else f"{count / 2**20:.1f} MB"
