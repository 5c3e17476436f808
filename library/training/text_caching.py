"""Encoding a run's captions before training: the processes share the work, and the encoders go when it is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.architectures.base import Architecture
from library.config.arguments import DatasetOptions
from library.data.text_cache import (
    CachedTexts,
    DiskTexts,
    MemoryTexts,
    Report,
    TextEncoding,
    encode_to_disk,
    find_outdated,
    wanted_files,
)
from library.data.text_cache_format import TextSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.training.trainer import Run

logger = logging.getLogger(__name__)

#: captions encoded at a time, if not given; an encoder takes little memory beside what is trained later
BATCH_SIZE = 8


@dataclass(frozen=True)
class Tokenize:
    """Captions to token tensors; a picklable callable for the loader's workers."""

    architecture: Architecture
    tokenizers: Sequence[Any]
    max_token_length: int | None
    weighted: bool

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return self.architecture.tokenize(
            self.tokenizers, captions, max_token_length=self.max_token_length, weighted=self.weighted
        )


def caches_texts(options: DatasetOptions) -> bool:
    return options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk


def text_cache_row(options: DatasetOptions) -> str:
    """What the table before the first step says about it."""
    if not caches_texts(options):
        return "no"
    variants = options.text_encoder_cache_variants
    return ("on disk" if options.cache_text_encoder_outputs_to_disk else "in memory") + (
        f", {variants} variants of captions that vary" if variants > 1 else ""
    )


def cache_texts(architecture: Architecture, run: Run, report: Report) -> None:
    """Make or read the cache of encoded captions, if the run wants one; its batches then hold them.

    Raises:
        UserError: outputs that are not finite; a full disk.
    """
    options = run.options.dataset
    if not caches_texts(options):
        return
    accelerator, format = run.accelerator, architecture.text
    files = wanted_files(run.data.captioned(), format, options.text_encoder_cache_variants)
    store: DiskTexts | MemoryTexts
    if options.cache_text_encoder_outputs_to_disk:
        settings = TextSettings(
            architecture.text_identity(run.checked.checkpoint),
            dtype=run.weight_dtype,
            max_token_length=run.options.model.max_token_length,
            clip_skip=run.options.model.clip_skip,
            weighted=run.options.model.weighted_captions,
        )
        # whole files go to one process, so that none is checked or written twice
        own = files[accelerator.process_index :: accelerator.num_processes]
        outdated = find_outdated(own, format, settings, trust=options.skip_cache_check)
        if outdated:
            encode_to_disk(outdated, _load_encoding(architecture, run), format, settings, report)
        logger.info("text encoder outputs: %d files made, %d up to date", len(outdated), len(own) - len(outdated))
        accelerator.wait_for_everyone()
        store = DiskTexts(format, run.weight_dtype, trust=options.skip_cache_check)
    else:
        store = MemoryTexts(caption for file in files for caption in file.captions)
        _fill(store, _load_encoding(architecture, run), accelerator, report)
        logger.info("text encoder outputs: %d captions encoded", len(store.captions))
    run.data.maker.texts = CachedTexts(store, options.text_encoder_cache_variants)
    if run.device.type == "cuda" and not run.options.training.highvram:
        torch.cuda.empty_cache()


def _load_encoding(architecture: Architecture, run: Run) -> TextEncoding:
    """Load tokenizers and encoders, for as long as the result is held."""
    model, checkpoint = run.options.model, run.checked.checkpoint
    encoders = architecture.load_text_encoders(checkpoint, dtype=run.weight_dtype, device=str(run.device))

    def encode(tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # as in a step, so that training is the same with and without the cache
        with torch.no_grad(), run.accelerator.autocast():
            moved = {name: values.to(run.device) for name, values in tokens.items()}
            return architecture.encode_text(encoders, moved, clip_skip=model.clip_skip).tensors

    return TextEncoding(
        Tokenize(
            architecture, architecture.load_tokenizers(checkpoint), model.max_token_length, model.weighted_captions
        ),
        encode,
        dtype=run.weight_dtype,
        batch_size=run.options.dataset.text_encoder_batch_size or BATCH_SIZE,
    )


def _fill(memory: MemoryTexts, encoding: TextEncoding, accelerator: Accelerator, report: Report) -> None:
    """Encode this process's share of the captions, and get the others' from them, batch by batch."""
    count = accelerator.num_processes
    shares = _equal_shares(memory.captions, count)
    gathered: list[tuple[str, Mapping[str, Tensor]]] = []
    for done, (caption, row) in enumerate(encoding.rows(shares[accelerator.process_index]), start=1):
        gathered.append((caption, row))
        if len(gathered) < encoding.batch_size and done < len(shares[0]):
            continue
        first = done - len(gathered)
        stacked = {name: torch.stack([row[name] for _, row in gathered]) for name in row}
        if count > 1:
            stacked = {name: _gather(values, accelerator) for name, values in stacked.items()}
        captions = [caption for share in shares for caption in share[first:done]]
        for place, name_of_row in enumerate(captions):
            memory.put(name_of_row, {name: values[place] for name, values in stacked.items()})
        gathered.clear()
        report(min(done * count, len(memory.captions)), len(memory.captions))


def _equal_shares(captions: Sequence[str], count: int) -> list[list[str]]:
    """One for each process, of the same length, as all gather at once: the first captions may be there twice."""
    length = -(-len(captions) // count)
    padded = (list(captions) * count)[: length * count]
    return [padded[place::count] for place in range(count)]


def _gather(values: Tensor, accelerator: Accelerator) -> Tensor:
    """(B, ...) of every process -> (processes * B, ...), in their order. As bytes: not all backends know all dtypes."""
    own = values.contiguous().view(torch.uint8).to(accelerator.device)
    return accelerator.gather(own).cpu().view(values.dtype)
