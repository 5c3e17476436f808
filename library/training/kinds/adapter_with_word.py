"""Pivotal tuning: a network and the vectors of a new word, trained in one run.

Cloneofsimo 2022, "Pivotal Tuning Inversion" for LoRA; after Roich et al. 2021, "Pivotal Tuning for Latent-based Editing
of Real Images" (arXiv:2106.05744). The word is a kind of its own, with this kind's names of options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.data.dataset import TrainingData
from library.files.atomic import clear, make_folder
from library.inference.textual_inversion import vectors_in
from library.training.kinds.adapter import Adapter
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.kinds.base import Kind, Need, ParameterGroup
from library.training.kinds.embedding import Embedding
from library.training.kinds.embedding_options import EmbeddingOptions
from library.training.models import Models
from networks.bundled_words import bundled, bundled_words, write_with_words


class _Word(Embedding):
    other_captions = ""
    flags = {
        "token_string": "--train_embedding",
        "init_word": "--embedding_init_word",
        "num_vectors_per_token": "--embedding_vectors",
        "weights": "--embedding_weights",
    }

    @classmethod
    def start_of(cls, options: Any, encoders: int) -> list[Tensor]:
        """Read an embedding file, or the word within the file of an adapter."""
        path, own = Path(options.embedding.weights), options.embedding
        words = bundled_words(path)
        if own.token_string in words:
            return vectors_in(words[own.token_string], encoders, flag=f"{cls.flags['weights']} {path}")
        return super().start_of(options, encoders)


class AdapterWithWord(Adapter):
    """Networks of ``--network_module``, and with ``--train_embedding`` a new word beside them."""

    def __init__(self, architecture: Architecture, options: TrainNetworkOptions, checkpoint: Any, **more: Any) -> None:
        super().__init__(architecture, options, checkpoint, **more)
        self._word = _Word(architecture, _options_of_word(options), checkpoint, **more)

    @classmethod
    def for_options(cls, options: TrainNetworkOptions) -> type[Kind]:
        return cls if options.word.train_embedding else Adapter

    @classmethod
    def files_beside(cls, architecture: Architecture, options: TrainNetworkOptions, path: Path) -> list[Path]:
        token = options.word.train_embedding
        return [] if options.word.bundle_embedding or not token else [_embedding_path(path, token)]

    # ---- before anything is loaded ----

    @classmethod
    def check_options(cls, architecture: Architecture, options: TrainNetworkOptions) -> None:
        super().check_options(architecture, options)
        _Word.check_options(architecture, _options_of_word(options))

    @classmethod
    def trained_encoders(cls, architecture: Architecture, options: TrainNetworkOptions) -> tuple[bool, ...]:
        return _Word.trained_encoders(architecture, options)

    @classmethod
    def learning_rate_flags(cls, options: TrainNetworkOptions) -> list[str]:
        own = ["--embedding_lr"] if options.word.embedding_lr is not None else []
        return super().learning_rate_flags(options) + own

    @classmethod
    def check_data(cls, options: TrainNetworkOptions, data: TrainingData) -> None:
        _Word.check_data(_options_of_word(options), data)

    @classmethod
    def shaping_options(cls, options: TrainNetworkOptions) -> list[str]:
        return [*super().shaping_options(options), "train_embedding", "embedding_vectors"]

    # ---- setting up ----

    def needs(self) -> Mapping[str, Need]:
        return self._word.needs()

    def attach(self, models: Models) -> list[ParameterGroup]:
        words = self._word.attach(models)
        return [*super().attach(models), *words]

    def attach_on_meta(self, models: Models) -> list[ParameterGroup]:
        words = self._word.attach(models)
        return [*super().attach_on_meta(models), *words]

    def modules(self) -> Sequence[nn.Module]:
        return [*super().modules(), *self._word.modules()]

    # ---- the step ----

    @property
    def trains_text(self) -> bool:
        return True

    # ---- files and records ----

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], *, step: int, epoch: int
    ) -> None:
        token = self.options.word.train_embedding
        assert token is not None
        if not self.options.word.bundle_embedding:
            super().save(path, dtype, metadata, step=step, epoch=epoch)
            self._word.save(_embedding_path(path, token), dtype, metadata, step=step, epoch=epoch)
            return
        # network modules write files of their own; the folder's name is one that runs clear after a kill
        folder = path.with_name(f".{path.name}.tmp")
        clear(folder)
        make_folder(folder)
        super().save(folder / path.name, dtype, metadata, step=step, epoch=epoch)
        write_with_words(folder / path.name, path, bundled(token, self._word.tensors(dtype)))
        clear(folder)

    def metadata(self) -> dict[str, object]:
        own = self.options.word
        return super().metadata() | {
            "ss_train_embedding": own.train_embedding,
            "ss_embedding_vectors": own.embedding_vectors,
        }

    def rows(self, count: int) -> list[tuple[str, str]]:
        words = sum(p.numel() for module in self._word.modules() for p in module.parameters())
        own = self.options.word
        start = own.embedding_weights or own.embedding_init_word
        row = ("word", f"{own.train_embedding}, {own.embedding_vectors} tokens, from {start}; {words:,} numbers")
        return [*super().rows(count - words), row]


def _embedding_path(path: Path, word: str) -> Path:
    """Return the embedding's file beside that of a network."""
    return path.with_name(f"{path.stem}_{word}{path.suffix}")


def _options_of_word(options: TrainNetworkOptions) -> Any:
    """Return what the kind of the word reads, from the options of a network's script."""
    own, optimizer = options.word, options.optimizer
    if own.embedding_lr is not None:
        optimizer = replace(optimizer, learning_rate=own.embedding_lr)
    embedding = EmbeddingOptions(
        token_string=own.train_embedding,
        init_word=own.embedding_init_word,
        num_vectors_per_token=own.embedding_vectors,
        weights=own.embedding_weights,
    )
    return SimpleNamespace(embedding=embedding, optimizer=optimizer, training=options.training)
