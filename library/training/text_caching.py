"""Encode a run's captions before training: the processes share the work, and the encoders are freed afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.common.clip_text import tokens_of_words
from library.architectures.ragged import joined, padded
from library.config.arguments import DatasetOptions, ModelOptions
from library.data.cache_format import check_places
from library.data.caption_lengths import measure_of, warn_of_cut_captions
from library.data.dataset import TrainingData
from library.data.latent_cache import barrier
from library.data.text_cache import (
    CachedTexts,
    DiskTexts,
    MemoryTexts,
    Report,
    TextEncoding,
    TextFile,
    encode_to_disk,
    find_outdated,
    wanted_files,
)
from library.data.text_cache_format import TextSettings
from library.training.caching import CacheJob
from library.training.processes import peers_of

if TYPE_CHECKING:
    from accelerate import Accelerator


logger = logging.getLogger(__name__)

T = TypeVar("T")

#: captions encoded at a time, if not given; an encoder needs little memory compared with training
BATCH_SIZE = 8


def warn_of_cut(
    data: TrainingData, architecture: Architecture, tokenizers: Sequence[Any], options: ModelOptions
) -> None:
    """Warn once of truncated captions of a run; on the main process only."""
    measure = measure_of(
        architecture, tokenizers, max_token_length=options.max_token_length, weighted=options.weighted_captions
    )
    warn_of_cut_captions(
        data.captioned(),
        measure,
        length_option=architecture.length_option,
        tokens_of_words=max(map(tokens_of_words, tokenizers), default=0),
    )


@dataclass(frozen=True)
class Tokenize:
    """Turns captions into token tensors; a picklable callable for the loader's workers."""

    architecture: Architecture
    tokenizers: Sequence[Any]
    max_token_length: int | None
    weighted: bool

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        worded = [self.architecture.worded(caption, "caption") for caption in captions]
        return self.architecture.tokenize(
            self.tokenizers, worded, max_token_length=self.max_token_length, weighted=self.weighted
        )


def caches_texts(options: DatasetOptions) -> bool:
    return options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk


def text_cache_row(options: DatasetOptions) -> str:
    """Return the row of the table before the first step."""
    if not caches_texts(options):
        return "no"
    variants = options.text_encoder_cache_variants
    return ("on disk" if options.cache_text_encoder_outputs_to_disk else "in memory") + (
        f", {variants} variants of captions that vary" if variants > 1 else ""
    )


def cache_texts(job: CacheJob, use: Callable[[TextModels], T] | None = None, *, in_part: bool = False) -> T | None:
    """Complete the cache of encoded captions, by all processes together; the batches of the job's data use it.

    Args:
        use: a function of tokenizers and encoders, which are freed afterwards; its result is returned.
        in_part: whether some encoders are trained, so that batches hold tokens too.

    Raises:
        UserError: outputs that are not finite; a full disk.
        SystemExit: after Ctrl-C or SIGTERM; another process had an error.
    """
    options, architecture = job.options.dataset, job.architecture
    load = cache(lambda: TextModels.load(job))
    files = wanted_files(job.data.captioned(), architecture.text, options.text_encoder_cache_variants)
    if job.accelerator.is_main_process:
        warn_of_cut(job.data, architecture, architecture.load_tokenizers(job.checkpoint), job.options.model)
    with job.progress("encoding captions", "files" if options.cache_text_encoder_outputs_to_disk else "captions") as p:

        def report(done: int, total: int) -> None:
            p.update(done, total)
            job.stop_if_asked()

        store: DiskTexts | MemoryTexts
        if options.cache_text_encoder_outputs_to_disk:
            made = _write(job, files, lambda: _encoding(job, load()), report)
            store = DiskTexts(architecture.text, job.weight_dtype, trust=options.skip_cache_check)
            text = f"{made} files made, {len(files) - made} from the cache"
        else:
            store = MemoryTexts((caption for file in files for caption in file.captions), architecture.text.ragged)
            _fill(store, _encoding(job, load()), job.accelerator, report)
            store.complete()
            text = f"{len(store.captions)} captions encoded"
    if job.accelerator.is_main_process:
        logger.info("text encoder outputs: %s", text)
    job.data.maker.texts = CachedTexts(store, options.text_encoder_cache_variants, in_part)
    result = use(load()) if use is not None else None
    load.cache_clear()
    job.release_memory()
    return result


@dataclass(frozen=True)
class TextModels:
    """Tokenizers and text encoders."""

    tokenizers: list[Any]
    encoders: list[nn.Module]

    @staticmethod
    def load(job: CacheJob) -> TextModels:
        """Load them on the job's device."""
        dtype, device = job.weight_dtype, str(job.device)
        encoders = job.architecture.load_text_encoders(job.checkpoint, dtype=dtype, device=device)
        return TextModels(job.architecture.load_tokenizers(job.checkpoint), encoders)


def _encoding(job: CacheJob, models: TextModels) -> TextEncoding:
    model, architecture = job.options.model, job.architecture

    def encode(tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # as in a step, so that training is the same with and without the cache
        with torch.no_grad(), job.accelerator.autocast():
            moved = {name: values.to(job.device) for name, values in tokens.items()}
            return architecture.encode_text(models.encoders, moved, clip_skip=model.clip_skip).tensors

    return TextEncoding(
        Tokenize(architecture, models.tokenizers, model.max_token_length, model.weighted_captions),
        encode,
        dtype=job.weight_dtype,
        batch_size=job.options.dataset.text_encoder_batch_size or BATCH_SIZE,
        ragged=architecture.text.ragged,
    )


def _write(job: CacheJob, files: Sequence[TextFile], encoding: Callable[[], TextEncoding], report: Report) -> int:
    """Write missing and outdated files; returns how many. Each file is made by one process."""
    format, model, peers = job.architecture.text, job.options.model, peers_of(job.accelerator)
    settings = TextSettings(
        job.architecture.text_identity(job.checkpoint),
        dtype=job.weight_dtype,
        max_token_length=model.max_token_length,
        clip_skip=model.clip_skip,
        weighted=model.weighted_captions,
        own=format.settings,
    )
    mine = files[peers.rank :: peers.count]
    outdated = set(find_outdated(mine, format, settings, trust=job.options.dataset.skip_cache_check))
    # distributed again, because all missing files may be in one part
    missing = sorted(peers.gather([i for i, file in enumerate(files) if file in outdated]))
    share = [files[i] for i in missing[peers.rank :: peers.count]]
    with barrier(peers):
        check_places((file.path for file in share), "--cache_text_encoder_outputs_to_disk")
        if share:
            encode_to_disk(share, encoding(), format, settings, report)
    return len(missing)


def _fill(memory: MemoryTexts, encoding: TextEncoding, accelerator: Accelerator, report: Report) -> None:
    """Encode this process's part of the captions, and gather the others' batch by batch."""
    count = accelerator.num_processes
    shares = _equal_shares(memory.captions, count)
    gathered: list[tuple[str, Mapping[str, Tensor]]] = []
    for done, (caption, row) in enumerate(encoding.rows(shares[accelerator.process_index]), start=1):
        gathered.append((caption, row))
        if len(gathered) < encoding.batch_size and done < len(shares[0]):
            continue
        first = done - len(gathered)
        stacked = {name: joined([row[name][None] for _, row in gathered]) for name in row}
        if count > 1:
            stacked = {
                name: _gather(_as_long(values, accelerator) if name in memory.ragged else values, accelerator)
                for name, values in stacked.items()
            }
        captions = [caption for share in shares for caption in share[first:done]]
        for place, name_of_row in enumerate(captions):
            memory.put(name_of_row, {name: values[place] for name, values in stacked.items()})
        gathered.clear()
        report(min(done * count, len(memory.captions)), len(memory.captions))


def _equal_shares(captions: Sequence[str], count: int) -> list[list[str]]:
    """Return one part per process, of equal length because gathering is collective: the first captions may appear
    twice."""
    length = -(-len(captions) // count)
    padded = (list(captions) * count)[: length * count]
    return [padded[place::count] for place in range(count)]


def _as_long(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return (B, T, ...) padded to the longest T of all processes."""
    own = torch.tensor([values.shape[1]], device=accelerator.device)
    return padded(values, int(accelerator.gather(own).max()), axis=1)


def _gather(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather (B, ...) of every process to (processes * B, ...), in their order, as bytes: not all backends support all
    dtypes."""
    if not values.numel():  # such as of an encoder that no caption has words for
        return values.new_empty((len(values) * accelerator.num_processes, *values.shape[1:]))
    own = values.contiguous().view(torch.uint8).to(accelerator.device)
    return accelerator.gather(own).cpu().view(values.dtype)
