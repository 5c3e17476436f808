"""Repeat one step (``--replay``): a bad step is recorded in a file, from which its loss is computed again.

A recording is a safetensors file: the trained parameters before the step, and in its metadata the run's options
(without tokens and keys), the step's position and its batches. Model and images are read where the run read them. All
randomness is keyed (``library.randomness``), so noise, timesteps, captions and dropout are the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from library.config.arguments import RunOptions, flat, without_secrets
from library.data.batch import Batch
from library.data.run_plan import Origin, RunPlan
from library.errors import UserError
from library.files.safetensors_io import save_tensors
from library.interrupt import Interrupt
from library.randomness import key
from library.training.first_nonfinite import FirstNonFinite
from library.training.loaded import LoadedRun
from library.training.nonfinite import BadStep, BatchNote
from library.training.run import Run

_ENTRY, _VERSION = "replay", 1
#: groups of options without influence on a step
_LEFT_OUT = ("sample", "resume", "logging", "config")
#: gradients that a message names at most
_MOST_NAMES = 5


@dataclass(frozen=True)
class Recording:
    """The content of a replay file besides the weights."""

    step: int  # counted from 1
    seed: int
    rank: int  # the process whose batches are recorded
    processes: int
    plan: dict[str, Any]
    values: dict[str, str]  # loss and gradient norm over all processes, as texts: JSON has no NaN
    batches: list[dict[str, Any]]  # images, captions and loss of each
    options: dict[str, Any]
    version: int = _VERSION

    @staticmethod
    def of(
        bad: BadStep,
        notes: Sequence[BatchNote],
        *,
        rank: int,
        processes: int,
        options: RunOptions,
        plan: RunPlan,
        seed: int,
    ) -> Recording:
        """Record a step of a run."""
        return Recording(
            step=bad.step,
            seed=seed,
            rank=rank,
            processes=processes,
            plan=asdict(plan),
            values={name: str(value) for name, value in bad.values.items()},
            batches=[{**asdict(note), "loss": str(note.loss)} for note in notes],
            options=without_secrets(options),
        )


def write_recording(path: Path, recording: Recording, weights: Sequence[Tensor]) -> None:
    """Write a replay file atomically.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps(asdict(recording), default=str)
    save_tensors(path, {f"{index:05d}": tensor for index, tensor in enumerate(weights)}, {_ENTRY: text})


def read_recording(path: Path) -> tuple[Recording, list[Tensor]]:
    """Read a recording, and the trained parameters before its step.

    Raises:
        UserError: no such file, or not a replay file of a run.
    """
    if not path.is_file():
        raise UserError(f"--replay {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[_ENTRY])
            weights = [file.get_tensor(name) for name in sorted(file.keys())]
        if values["version"] != _VERSION:
            raise UserError(f"--replay {path}: written by another version of this program; use that one")
        return Recording(**values), weights
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--replay {path}: no replay file of a run, or a damaged one ({error})") from None


def replay(
    given: RunOptions,
    setup: Callable[[RunOptions], Run],
    load: Callable[[Run, Interrupt], LoadedRun],
) -> None:
    """Repeat the recorded step, print the result, and change nothing.

    Args:
        given: options of this start; those that differ from their defaults override the recorded ones.
        setup: checks options and sets up a run.
        load: makes its caches and loads its models.

    Raises:
        UserError: the file, or something that it refers to, cannot be used.
    """
    path = Path(str(given.config.replay))
    recording, weights = read_recording(path)
    with Interrupt() as interrupt:
        run = setup(_options(type(given), recording, given))
        if run.accelerator.num_processes > 1:
            raise UserError("--replay: runs in one process; start it without a launcher")
        plan = RunPlan(**{**recording.plan, "origin": Origin(**recording.plan["origin"])})
        batches = run.data.batches_per_process(recording.processes)
        if batches != plan.batches_per_epoch:
            raise UserError(
                f"--replay {path}: the data has changed: {batches} batches an epoch now, {plan.batches_per_epoch} then"
            )
        loaded = load(replace(run, plan=plan, start_step=recording.step - 1), interrupt)
        _put_back(loaded.update.parameters, weights, path)
        _run_again(loaded, recording)


def _options(kind: type[RunOptions], recording: Recording, given: RunOptions) -> RunOptions:
    """Return the recorded options, overridden by those given now."""
    now = {field.name: value for field, value in flat(given) if value != field.default}
    values = {**recording.options, "seed": recording.seed, **now}
    options = kind.from_args(argparse.Namespace(**values))
    groups = kind.groups()
    return replace(options, **{name: groups[name]() for name in _LEFT_OUT if name in groups}, console=given.console)


def _put_back(trained: Sequence[nn.Parameter], weights: Sequence[Tensor], path: Path) -> None:
    parameters = [p for p in trained if p.requires_grad]
    if [tuple(p.shape) for p in parameters] != [tuple(w.shape) for w in weights]:
        raise UserError(f"--replay {path}: its weights are of another network; give no options of the network with it")
    with torch.no_grad():
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.copy_(value)


def _run_again(loaded: LoadedRun, recording: Recording) -> None:
    run, kind = loaded.run, loaded.kind
    position = run.plan.position(recording.step - 1)
    loaded.saver.set_training(True)
    kind.begin_epoch(position.epoch + 1)
    batches = run.data.dataloader(
        epoch=position.epoch,
        start_batch=position.batch_in_epoch,
        rank=recording.rank,
        world_size=recording.processes,
        plan=run.plan,
        **loaded.loading,
    )
    print(f"step {recording.step}, seed {recording.seed}, process {recording.rank + 1} of {recording.processes}")
    finite = True
    for index in range(run.plan.batches_of_step(position.batch_in_epoch)):
        batch = next(batches).to(run.device)
        kind.begin_batch(batch, recording.step - 1)
        torch.manual_seed(key(recording.seed, "batch", recording.step - 1, index, recording.rank))
        finite &= _batch_again(loaded, batch)
    finite &= _gradients(kind.modules(), loaded.update.parameters)
    print("this time everything is finite" if finite else "the step is not finite again")


def _batch_again(loaded: LoadedRun, batch: Batch) -> bool:
    """Print the losses of a batch, and where they stop being finite; returns whether they are finite."""
    models = loaded.models
    roots = {"denoiser": models.denoiser, "vae": models.vae}
    roots |= {f"text encoder {number}": encoder for number, encoder in enumerate(models.text_encoders, start=1)}
    known = {id(module) for module in roots.values()}
    others = [module for module in loaded.kind.modules() if id(module) not in known]
    roots |= {f"network {number}" if len(others) > 1 else "network": module for number, module in enumerate(others, 1)}
    with FirstNonFinite({name: module for name, module in roots.items() if module is not None}) as first:
        losses = loaded.losses(batch)
    loss = losses.mean()
    loaded.run.accelerator.backward(loss)
    print(f"loss {loss.item()}")
    rows = zip(batch.paths, batch.captions, losses.tolist(), batch.loss_weights.tolist(), strict=True)
    for path, caption, one, weight in rows:
        print(f"  {path} {caption!r}: loss {one}, weight {weight:g}")
    if first.found is not None:
        print(first.found.text())
    elif not bool(losses.isfinite().all()):
        print("  every module's output is finite: look at the loss and its weights")
    return bool(losses.isfinite().all())


def _gradients(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> bool:
    """Print the norm of the gradients, and those that are not finite; returns whether all are finite."""
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    # float64, so that the sum of squares does not overflow
    norms = {names.get(id(p), "?"): p.grad.double().norm().item() for p in parameters if p.grad is not None}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    wrong = [name for name, norm in norms.items() if not norm < float("inf")]
    print(f"gradient norm {total}")
    if wrong:
        more = f" and {len(wrong) - _MOST_NAMES} more" if len(wrong) > _MOST_NAMES else ""
        print(f"  not finite: the gradients of {', '.join(wrong[:_MOST_NAMES])}{more}")
    return not wrong
