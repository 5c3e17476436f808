"""Trace a training step of a run without weights, to know what it takes before anything is loaded (``--memory_plan``).

Models are built from their files' headers. Loss, backward pass and update are the run's own, on tensors of the run's
device that have shapes and dtypes but no numbers; every allocation is counted. See ``library/memory/stand_in.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning
from library.config.console import quiet
from library.data.batch import Batch
from library.data.bucketed import BucketedDataset
from library.data.caption_lengths import longest_uses
from library.data.dataset import TrainingData
from library.errors import UserError
from library.memory import stand_in
from library.memory.host import use_host_kernels
from library.optim.fused_backward import FusedBackward
from library.optim.optimizers import OptimizerChoice
from library.optim.pieces import Pieces
from library.optim.stochastic_rounding import train_in_half
from library.optim.trial import updates_alone
from library.training.kinds.base import Kind
from library.training.loading import batch_losses, make_kind, models_on_meta
from library.training.models import Models
from library.training.run import Run
from library.training.text_caching import Tokenize

logger = logging.getLogger(__name__)

Size = tuple[int, int]


@dataclass(frozen=True)
class TracedStep:
    """The memory in bytes of a step on batches of one bucket."""

    bucket: Size  # (W, H)
    batch_size: int
    peak: int  # beyond weights and optimizer state, at the worst moment of forward pass, backward pass and update
    gradients: int  # that are there at the end of the backward pass


@dataclass(frozen=True)
class TracedRun:
    """The steps of a run with or without gradient checkpointing, and its models without weights."""

    checkpointing: bool
    steps: tuple[TracedStep, ...]
    models: Models
    trained: tuple[nn.Parameter, ...]
    state: int | None  # bytes of the optimizer's state; None for an optimizer that needs numbers

    @property
    def worst(self) -> TracedStep:
        return max(self.steps, key=lambda step: step.peak)


def trace(run: Run, *, checkpointing: bool, most: int = 2, host_kernels: bool = True) -> TracedRun:
    """Trace steps on the largest buckets.

    Args:
        most: buckets to trace at most.
        host_kernels: use the kernels of a run on a CPU there.

    Raises:
        UserError: headers that lack tensors, or whose shapes do not fit.
    """
    run = _with_checkpointing(run, checkpointing)
    choice = run.checked.optimizer
    if not host_kernels and choice.path.startswith("torch.optim."):
        # as torch does on a GPU, where it is the default
        choice = replace(choice, args={"foreach": True, **choice.args})
    kind = make_kind(run)
    is_half = any(need.dtype in (torch.bfloat16, torch.float16) for need in kind.needs().values())
    # it is tried with numbers
    alone = (is_half or kind.fused_flag(run.options) is not None) and updates_alone(choice, run.device)
    how: dict[str, Any] = {"checkpointing": checkpointing, "most": most, "host_kernels": host_kernels}
    try:
        return _traced(run, _Updates(choice, run.checked.seed, alone), **how)
    except UserError:
        raise
    except Exception as error:  # of a third-party class, whatever it does without numbers
        logger.info(
            "memory plan: %s cannot be traced (%s); what its update takes for a moment is not part of the values",
            choice.name,
            str(error).partition("\n")[0] or type(error).__name__,
        )
        return _traced(run, _Updates(None, run.checked.seed, alone), **how)


class _Updates:
    """The run's optimizer on weights without numbers, after the backward pass or within it.

    Args:
        choice: None for one that frees the gradients and does nothing else.
        alone: see ``updates_alone``.
    """

    def __init__(self, choice: OptimizerChoice | None, seed: int, alone: bool) -> None:
        self._choice, self._seed, self._alone = choice, seed, alone
        self._optimizer: torch.optim.Optimizer | None = None
        self._fused: FusedBackward | None = None
        self.parameters: list[nn.Parameter] = []

    def attach(self, kind: Kind, groups: Sequence[dict[str, Any]], device: torch.device, *, fused: bool) -> None:
        """Make the optimizer for parameter groups, and take a step in which its state gets its places."""
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        pieces: Any = _NoPieces()
        if self._choice is not None:
            self._optimizer = self._choice.create(groups)
            if any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters):
                train_in_half(self._optimizer, self._seed, alone=self._alone)
            pieces = Pieces(self._optimizer)
        if fused:
            self._pieces, self._fused = pieces, FusedBackward(pieces, kind.fused_parts(self.parameters))
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with stand_in.Trace(device.type):
            self.step()

    def before_backward(self) -> None:
        if self._fused is not None:
            self._fused.before_backward(is_last=True)

    def step(self) -> None:
        if self._fused is not None:
            self._pieces.end_step()
        elif self._optimizer is not None:
            self._optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def states(self) -> list[Tensor]:
        """Return the optimizer's state."""
        return [] if self._optimizer is None else _states(self._optimizer)

    @property
    def state(self) -> int | None:
        """Return the bytes of the optimizer's state."""
        return None if self._optimizer is None else sum(tensor.nbytes for tensor in self.states())


class _NoPieces:
    """Stands for ``Pieces`` of an optimizer that cannot be traced."""

    def update(self, parameters: object) -> None: ...

    def end_step(self) -> None: ...


def _traced(run: Run, updates: _Updates, *, checkpointing: bool, most: int, host_kernels: bool) -> TracedRun:
    models = models_on_meta(run)
    if run.architecture.attention(run.options.training) not in ("torch", "efficient", "math"):
        # the kernels of packages do not run without numbers; they take as much memory as torch's
        run.architecture.set_attention(models.denoiser, "torch", split=run.options.training.split_attn)
    kind = make_kind(run)
    architecture = run.architecture
    with stand_in.without_weights(), quiet(logging.INFO):
        for module in models.modules():
            stand_in.place_without_numbers(module, run.device)
        groups = kind.attach_without_numbers(models)
        placed: dict[Tensor, nn.Parameter] = {}
        for module in kind.modules():
            if not any(module is model for model in models.modules()):
                placed |= stand_in.place_without_numbers(module, run.device)
        modules = [*models.modules(), *kind.modules()]
        if host_kernels and run.device.type == "cpu":
            use_host_kernels(models.denoiser, convolutions=True)
        if checkpointing:
            architecture.enable_gradient_checkpointing(models.denoiser, models.text_encoders)
        kind.set_training(True)
        settings = [{**g.settings, "params": [placed.get(p, p) for p in g.parameters]} for g in groups]
        updates.attach(kind, settings, run.device, fused=kind.fused_flag(run.options) is not None)
        trained = tuple(p for module in kind.modules() for p in module.parameters() if p.requires_grad)
        # all encoders have places here, also those whose outputs the run reads from a cache
        whole = replace(models, cached=(False,) * len(models.text_encoders))
        losses = batch_losses(run, whole, kind)
        text = _encoded(run, whole, kind, losses.autocast)
        steps = tuple(
            _step(
                kind,
                losses,
                updates,
                modules,
                _batch(
                    architecture,
                    bucket,
                    count,
                    text,
                    encodes_images=not run.caches_latents,
                    reads_images=run.data.conditioning_as == "image",
                ),
                run.device,
            )
            for bucket, count in _largest(run.data.datasets, most)
        )
    return TracedRun(checkpointing, steps, models, trained, updates.state)


def _with_checkpointing(run: Run, checkpointing: bool) -> Run:
    """Return the run with or without gradient checkpointing, which kinds ask their options for."""
    options = run.options
    options = replace(options, training=replace(options.training, gradient_checkpointing=checkpointing))
    return replace(run, checked=replace(run.checked, options=options))


def _largest(datasets: Sequence[BucketedDataset], most: int) -> list[tuple[Size, int]]:
    """Return the buckets with the most pixels in a batch, (W, H), and their batch sizes."""
    found = {
        (bucket, min(dataset.spec.batch_size, len(uses)))
        for dataset in datasets
        for bucket, uses in dataset.uses_by_bucket.items()
    }
    return sorted(found, key=lambda pair: pair[0][0] * pair[0][1] * pair[1], reverse=True)[:most]


def _encoded(run: Run, models: Models, kind: Kind, autocast: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tokens of the longest caption, and its conditioning, which is empty if encoders are trained."""
    architecture = run.architecture
    options = run.options.model
    tokenizers = architecture.load_tokenizers(run.checked.checkpoint)
    tokens = Tokenize(architecture, tokenizers, options.max_token_length, options.weighted_captions)(
        [_longest_caption(run.data)]
    )
    if kind.trains_text:
        return tokens, {}
    moved = {name: tensor.to(run.device) for name, tensor in tokens.items()}
    with torch.no_grad(), autocast():
        encoded: Conditioning = architecture.encode_text(models.text_encoders, moved, clip_skip=options.clip_skip)
    return {}, encoded.tensors


def _longest_caption(data: TrainingData) -> str:
    """Return the longest caption of a run: what some families' denoisers read is as long as the captions."""
    uses = (use for record, rules in data.captioned() for use in longest_uses(record.caption, rules))
    return max(uses, key=len, default="")


def _step(
    kind: Kind,
    losses: Any,
    updates: _Updates,
    modules: Iterable[nn.Module],
    batch: Batch,
    device: torch.device,
) -> TracedStep:
    batch = batch.to(device)
    kept = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    traced = stand_in.Trace(device.type)
    for tensor in (*kept.values(), *_tensors(batch), *updates.states()):
        traced.track(tensor)
    before = traced.now
    kind.begin_batch(batch, 0)
    with traced:
        updates.before_backward()
        losses(batch).mean().backward()
        gradients = sum(p.grad.nbytes for p in updates.parameters if p.grad is not None)
        updates.step()
    return TracedStep(batch.bucket, len(batch.visits), traced.peak - before, gradients)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for value in (*vars(batch).values(), *(batch.text or {}).values()):
        if isinstance(value, Tensor):
            yield value


def _batch(
    architecture: Architecture,
    bucket: Size,
    count: int,
    text: tuple[dict[str, Tensor], dict[str, Tensor]],
    *,
    encodes_images: bool,
    reads_images: bool,
) -> Batch:
    """Return a batch of black images, or of empty latents."""
    latent, (width, height) = architecture.latent, bucket
    tokens, encoded = text
    sizes = torch.tensor([[height, width]]).repeat(count, 1)
    pixels = torch.zeros(count, 3, height, width)
    return Batch(
        latents=None
        if encodes_images
        else torch.zeros(count, latent.channels, height // latent.stride, width // latent.stride),
        images=pixels if encodes_images else None,
        loss_masks=None,
        conditioning_images=pixels if reads_images else None,
        captions=[""] * count,
        tokens={name: tensor.repeat(count, *(1,) * (tensor.dim() - 1)) for name, tensor in tokens.items()},
        visits=list(range(count)),
        loss_weights=torch.ones(count),
        paths=[""] * count,
        bucket=bucket,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        flipped=[False] * count,
        text={name: tensor.repeat(count, *(1,) * (tensor.dim() - 1)) for name, tensor in encoded.items()} or None,
    )


def state_bytes(choice: OptimizerChoice, numbers: int, dtype: torch.dtype) -> int:
    """Return the bytes of an optimizer's state for so many trained numbers; found out on a small matrix."""
    parameter = nn.Parameter(torch.ones(128, 128, dtype=dtype))
    optimizer = choice.create([{"params": [parameter]}])
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return sum(tensor.nbytes for tensor in _states(optimizer)) * numbers // parameter.numel()


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state that grow with the parameters."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor) and value.numel() > 1]
