"""``--dry_run``: check options, data and headers of a run and print its plan, without loading weights.

Models are built on the meta device from their files' headers, so that names, shapes and the network are checked as in
loading, and parameters can be counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from torch import nn

from library.files.safetensors_io import is_pickle, read_header
from library.training.checkpoints import ema_path
from library.training.loading import make_kind, models_on_meta
from library.training.memory import check_swapping, memory_plan
from library.training.outputs import check_output
from library.training.planned_files import PlannedFile, planned_files
from library.training.precision import trained_dtype
from library.training.processes import on_main_process
from library.training.resume import name_changes
from library.training.run import Run
from library.training.summary import summary

#: lines that are shown at each end of a long list of files
_SHOWN = 6

_CLOSING = "dry run: all checks passed; no weights were loaded"

Rows = list[tuple[str, str]]


def dry_run(run: Run) -> None:
    """Check what the setup cannot, and print the plan on the main process.

    Raises:
        UserError: headers that lack tensors or do not fit, network arguments or weights that do not fit the model.
    """
    on_main_process(run.accelerator, lambda: check_output(run, tried=False))
    models = models_on_meta(run)
    check_swapping(run, models)
    kind = make_kind(run)
    groups = kind.attach_on_meta(models)
    parameters = [p for group in groups for p in group.parameters]
    resumed = run.checked.resumed
    if resumed is not None:
        name_changes(resumed, run.fingerprint)
    done = resumed.current_step if resumed is not None else run.start_step
    if not run.accelerator.is_main_process:
        return
    rows: Rows = [("file", _stored(Path(run.checked.checkpoint.path)))]
    rows += [(title, _size_of(model.parameters())) for title, model in models.named()]
    rows += [
        (f"trained, {group.name or 'network'}", f"{sum(p.numel() for p in group.parameters):,} parameters")
        for group in groups
    ]
    rows += memory_plan(run, kind).rows()
    rows += summary(run, kind, models.denoiser, parameters)
    rows.append(("steps an epoch", str(run.plan.steps_per_epoch)))
    saved = run.options.output.save_precision
    width = 2 if saved in ("fp16", "bf16") else 4 if saved else trained_dtype(run.options.training).itemsize
    size = width * sum(p.numel() for p in parameters)
    rows.append(("weights file", f"about {_bytes(size)} each"))
    if done:
        rows.append(("continues", f"after step {done} of {run.plan.total_steps}"))
    files = planned_files(run.plan, run.policy, run.names, after_step=done)
    print_plan(rows, [*_other_files(run), *_lines(files, last_step=run.plan.total_steps)])


# ---- models ----


def _size_of(parameters: Iterable[nn.Parameter]) -> str:
    """``859,520,964 parameters, 1.72 GB in bfloat16``."""
    found = list(parameters)
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in found}))
    return f"{sum(p.numel() for p in found):,} parameters, {_bytes(sum(p.nbytes for p in found))} in {dtypes}"


def _stored(path: Path) -> str:
    """Return a model file's size, and its dtypes if the header has them; or a folder's size."""
    if path.is_dir():
        return f"{path}, {_bytes(sum(file.stat().st_size for file in path.rglob('*') if file.is_file()))} in all"
    size = _bytes(path.stat().st_size)
    if is_pickle(path):
        return f"{path}, {size}"
    numbers = Counter(info.dtype for info in read_header(path).tensors.values())
    dtypes = ", ".join(f"{count} tensors in {dtype}" for dtype, count in numbers.most_common())
    return f"{path}, {size}: {dtypes}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


# ---- files ----


def _lines(files: Sequence[PlannedFile], *, last_step: int) -> list[str]:
    def line(file: PlannedFile) -> str:
        when = "at the end" if file.step == last_step else f"after step {file.step}"
        notes = [f"removed after step {file.removed_after}"] if file.removed_after is not None else []
        notes += ["replaces what is there"] if file.path.exists() else []
        return f"{file.path} {when}" + "".join(f", {note}" for note in notes)

    if len(files) <= 2 * _SHOWN + 1:
        return [line(file) for file in files]
    shown = [line(file) for file in (*files[:_SHOWN], *files[-_SHOWN:])]  # there may be a hundred thousand
    return [*shown[:_SHOWN], f"... {len(files) - 2 * _SHOWN} more ...", *shown[_SHOWN:]]


def _other_files(run: Run) -> list[str]:
    options = run.options
    lines = [f"{run.checked.trackers.directory}: logs"]
    if options.dataset.cache_latents_to_disk:
        lines.append(f"beside the images: latents of {run.data.image_count()} images, where not there yet")
    if options.dataset.cache_text_encoder_outputs_to_disk:
        lines.append("beside the images: encoded captions, where not there yet")
    if options.optimizer.ema_decay is not None:
        lines.append(f"beside each file of weights: the average, as {ema_path(run.names.final()).name}")
    if options.validation.save_best:
        lines.append(f"{run.names.best()}: the weights of the lowest validation loss, whenever there is a new one")
    if (hub := run.checked.hub) is not None:
        states = " and states" if options.output.save_state_to_huggingface else ""
        lines.append(f"{hub.repo_id} on the Hub: every file of weights{states}, as {hub.place(run.names.final())}")
    if run.checked.prompts:
        sample = options.sample
        count = int(sample.sample_at_first)
        if epochs := sample.epochs_between:
            count += run.plan.total_steps // run.plan.steps_per_epoch // epochs
        elif steps := sample.steps_between:
            count += run.plan.total_steps // steps
        lines.append(f"{run.names.directory / 'sample'}: {count} times {len(run.checked.prompts)} sample images")
    return lines


# ---- printing ----


def print_plan(rows: Rows, files: Sequence[str], *, file: TextIO | None = None) -> None:
    """Print rows and files to standard output: a table on a terminal, plain lines elsewhere."""
    file = file or sys.stdout
    if not file.isatty():
        for name, value in rows:
            print(f"{name}: {value}", file=file)
        for line in files:
            print(f"would write: {line}", file=file)
        print(_CLOSING, file=file)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="plan", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    for number, line in enumerate(files):
        table.add_row("would write" if number == 0 else "", Text(line))
    console = Console(file=file)
    console.print(table)
    console.print(_CLOSING)
