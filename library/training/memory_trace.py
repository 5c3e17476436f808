"""Trace a training step of a run without weights, to know what it takes before anything is loaded (``--memory_plan``).

Models are built from their files' headers. Loss and backward pass are the run's own, on tensors of the run's device
that have shapes and dtypes but no numbers; every allocation is counted. See ``library/memory/stand_in.py``.
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
from library.memory import stand_in
from library.memory.host import use_host_kernels
from library.optim.optimizers import OptimizerChoice
from library.training.kinds.base import Kind
from library.training.loading import batch_losses, make_kind, models_on_meta
from library.training.models import Models
from library.training.run import Run
from library.training.text_caching import Tokenize

#: more tokens than any text encoder reads
_LONG_CAPTION = " ".join(["word"] * 600)
Size = tuple[int, int]


@dataclass(frozen=True)
class TracedStep:
    """The memory in bytes of a step on batches of one bucket."""

    bucket: Size  # (W, H)
    batch_size: int
    peak: int  # beyond weights and optimizer state, at the worst moment of forward and backward pass
    gradients: int  # that are there at the end


@dataclass(frozen=True)
class TracedRun:
    """The steps of a run with or without gradient checkpointing, and its models without weights."""

    checkpointing: bool
    steps: tuple[TracedStep, ...]
    models: Models
    trained: tuple[nn.Parameter, ...]

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
    models = models_on_meta(run)
    if run.architecture.attention(run.options.training) not in ("torch", "efficient", "math"):
        # the kernels of packages do not run without numbers; they take as much memory as torch's
        run.architecture.set_attention(models.denoiser, "torch", split=run.options.training.split_attn)
    kind = make_kind(run)
    architecture = run.architecture
    with stand_in.without_weights(), quiet(logging.INFO):
        for module in models.modules():
            stand_in.place_without_numbers(module, run.device)
        kind.attach_without_numbers(models)
        for module in kind.modules():
            if not any(module is model for model in models.modules()):
                stand_in.place_without_numbers(module, run.device)
        modules = [*models.modules(), *kind.modules()]
        if host_kernels and run.device.type == "cpu":
            use_host_kernels(models.denoiser, convolutions=True)
        if checkpointing:
            architecture.enable_gradient_checkpointing(models.denoiser, models.text_encoders)
        kind.set_training(True)
        trained = tuple(p for module in kind.modules() for p in module.parameters() if p.requires_grad)
        # all encoders have places here, also those whose outputs the run reads from a cache
        whole = replace(models, cached=(False,) * len(models.text_encoders))
        losses = batch_losses(run, whole, kind)
        text = _encoded(run, whole, kind, losses.autocast)
        steps = tuple(
            _step(
                kind,
                losses,
                modules,
                trained,
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
    return TracedRun(checkpointing, steps, models, trained)


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
    """Return the tokens of a long caption, and its conditioning, which is empty if encoders are trained."""
    architecture = run.architecture
    options = run.options.model
    tokenizers = architecture.load_tokenizers(run.checked.checkpoint)
    tokens = Tokenize(architecture, tokenizers, options.max_token_length, options.weighted_captions)([_LONG_CAPTION])
    if kind.trains_text:
        return tokens, {}
    moved = {name: tensor.to(run.device) for name, tensor in tokens.items()}
    with torch.no_grad(), autocast():
        encoded: Conditioning = architecture.encode_text(models.text_encoders, moved, clip_skip=options.clip_skip)
    return {}, encoded.tensors


def _step(
    kind: Kind,
    losses: Any,
    modules: Iterable[nn.Module],
    trained: Iterable[nn.Parameter],
    batch: Batch,
    device: torch.device,
) -> TracedStep:
    batch = batch.to(device)
    kept = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    traced = stand_in.Trace(device.type)
    for tensor in (*kept.values(), *_tensors(batch)):
        traced.track(tensor)
    before = traced.now
    kind.begin_batch(batch, 0)
    with traced:
        losses(batch).mean().backward()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    for parameter in trained:
        parameter.grad = None
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
    sizes = [
        tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor) and tensor.numel() > 1
    ]
    return sum(sizes) * numbers // parameter.numel()
