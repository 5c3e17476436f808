"""Textual inversion: the vectors of a new word, with frozen text encoders and a frozen denoiser.

Gal et al. 2022, "An Image is Worth One Word" (arXiv:2208.01618). Only the rows of the new tokens are parameters: the
vocabulary never changes, not even by weight decay, and no optimizer has a state for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.common.clip_text import EXPANSIONS
from library.architectures.common.grown_embedding import GrownEmbedding
from library.architectures.part import text_encoder_name
from library.data.caption_lengths import longest_uses
from library.data.dataset import TrainingData
from library.data.dataset_spec import DatasetConfig
from library.errors import UserError
from library.files.atomic import make_folder
from library.files.safetensors_io import save_pickle, save_tensors
from library.inference.textual_inversion import as_read, finder, new_tokens, read_vectors, vector_names
from library.training.kinds.base import Kind, Need, ParameterGroup
from library.training.kinds.embedding_options import DECLARATION, TrainEmbeddingOptions
from library.training.models import Models
from library.training.precision import trained_dtype

logger = logging.getLogger(__name__)

#: captions for objects and for styles; {} is the word
OBJECT_TEMPLATES = (
    "a photo of {}", "a photo of a {}", "a photo of the {}", "a photo of one {}", "a clear photo of a {}",
    "a close photo of a {}", "a bright photo of the {}", "a dark photo of the {}", "a cropped photo of a {}",
    "a small photo of the {}", "a picture of a {}", "a picture of the {}", "an image of a {}", "a drawing of a {}",
    "a rendering of a {}", "a good photo of the {}",
)  # fmt: skip
STYLE_TEMPLATES = (
    "a painting in the style of {}", "a picture in the style of {}", "a drawing in the style of {}",
    "an image in the style of {}", "a rendering in the style of {}", "a small painting in the style of {}",
    "a large painting in the style of {}", "a bright painting in the style of {}", "a dark painting in the style of {}",
    "a cropped painting in the style of {}", "a close painting in the style of {}",
    "a fine painting in the style of {}",
)  # fmt: skip


class Embedding(Kind):
    """Train the vectors of one new word."""

    declaration = DECLARATION
    options_class = TrainEmbeddingOptions
    modelspec_suffix = "/textual-inversion"
    records_run = False
    keeps_copies = True
    starts_from = "--weights"
    tracker_name = "textual_inversion"
    #: the end of the advice on captions without the word
    other_captions: ClassVar[str] = ", or use --use_object_template or --use_style_template"
    #: option -> the flag that sets it, for messages
    flags: ClassVar[Mapping[str, str]] = {
        name: f"--{name}" for name in ("token_string", "init_word", "num_vectors_per_token", "weights")
    }

    def __init__(self, architecture: Architecture, options: Any, checkpoint: Any, **more: Any) -> None:
        super().__init__(architecture, options, checkpoint, **more)
        self._rows = nn.ParameterDict()
        self.layers = 1  # with vectors of their own

    # ---- before anything is loaded ----

    @classmethod
    def normalized(cls, options: Any) -> Any:
        if options.output.output_name or not options.embedding.token_string:
            return options
        return replace(options, output=replace(options.output, output_name=options.embedding.token_string))

    @classmethod
    def check_options(cls, architecture: Architecture, options: Any) -> None:
        if not architecture.has_own_encoders:
            raise UserError(
                f"{cls.flags['token_string']}: this model does not read captions with CLIP alone; train an adapter"
            )
        if options.embedding.weights:
            cls.start_of(options, len(architecture.text_encoder_targets))

    @classmethod
    def start_of(cls, options: Any, encoders: int) -> list[Tensor]:
        """Return the vectors of each encoder in the file of ``--weights``. Raises UserError."""
        return read_vectors(Path(options.embedding.weights), encoders, flag=cls.flags["weights"])

    def read_start(self, encoders: int) -> list[Tensor]:
        """Return the vectors (layers * n, width) of each encoder in the file of ``--weights``. Raises UserError."""
        return self.start_of(self.options, encoders)

    @classmethod
    def trained_encoders(cls, architecture: Architecture, options: Any) -> tuple[bool, ...]:
        return (True,) * len(architecture.text_encoder_targets)

    @classmethod
    def shaping_options(cls, options: Any) -> list[str]:
        return ["num_vectors_per_token"]

    @classmethod
    def prepared_data(cls, options: Any, config: DatasetConfig) -> DatasetConfig:
        """Replace every caption by a random template each time it is used, if templates are wanted."""
        own = options.embedding
        templates = OBJECT_TEMPLATES if own.use_object_template else STYLE_TEMPLATES if own.use_style_template else ()
        if not templates:
            return config
        texts = tuple(template.format(own.token_string) for template in templates)
        datasets = []
        for dataset in config.datasets:
            subsets = [
                replace(
                    s, class_tokens=s.class_tokens or own.token_string, captions=replace(s.captions, templates=texts)
                )
                for s in dataset.subsets
            ]
            datasets.append(replace(dataset, subsets=tuple(subsets)))
        return replace(config, datasets=tuple(datasets))

    @classmethod
    def check_data(cls, options: Any, data: TrainingData) -> None:
        """Refuse data without the word in any caption. Raises UserError."""
        token = options.embedding.token_string
        word = finder(token)
        if not any(
            rules.templates or any(word.search(as_read(use)) for use in longest_uses(record.caption, rules))
            for record, rules in data.captioned()
        ):
            raise UserError(
                f"{cls.flags['token_string']} {token}: no caption has this word; write it into captions, give it as "
                f"class_tokens{cls.other_captions}"
            )

    # ---- setting up ----

    def needs(self) -> Mapping[str, Need]:
        need = Need(trained_dtype(self.options.training))
        count = len(self.architecture.text_encoder_targets)
        return {text_encoder_name(number): need for number in range(1, count + 1)}

    def attach(self, models: Models) -> list[ParameterGroup]:
        own, groups = self.options.embedding, []
        tokenizers = models.tokenizers or self.architecture.load_tokenizers(self.checkpoint)
        count = len(models.text_encoders)
        given = self.read_start(count) if own.weights else [None] * count
        for index, (tokenizer, encoder, start) in enumerate(zip(tokenizers, models.text_encoders, given, strict=True)):
            name = text_encoder_name(index + 1)
            rows = self._attach(tokenizer, encoder, start)
            self._rows[name] = rows
            groups.append(ParameterGroup({"params": [rows], "lr": self.options.optimizer.learning_rate}, name))
        return groups

    def _attach(self, tokenizer: Any, encoder: nn.Module, start: Tensor | None) -> nn.Parameter:
        own = self.options.embedding
        table = encoder.get_input_embeddings().weight
        init = [] if start is not None else self._initial_tokens(tokenizer)
        ids = new_tokens(
            tokenizer,
            own.token_string,
            own.num_vectors_per_token,
            flag=f"{self.flags['token_string']} {own.token_string}",
        )
        if start is None:
            rows = table.detach()[[init[i % len(init)] for i in range(len(ids))]].repeat(self.layers, 1)
        elif start.shape != (self.layers * len(ids), table.shape[1]):
            there = len(start) // self.layers
            raise UserError(
                f"{self.flags['weights']} {own.weights}: holds {there} vectors of {start.shape[1]} numbers, needed are "
                f"{len(ids)} of {table.shape[1]}; give {self.flags['num_vectors_per_token']} {there}, or a file for "
                "this model"
            )
        else:
            rows = start.to(table)
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise UserError("the tokenizer's ids of new words are not consecutive; it cannot be used")
        parameter = nn.Parameter(rows.clone().contiguous())
        encoder.set_input_embeddings(GrownEmbedding(table, parameter, ids[0], self.layers))
        setattr(tokenizer, EXPANSIONS, {**getattr(tokenizer, EXPANSIONS, {}), ids[0]: ids})
        return parameter

    def _initial_tokens(self, tokenizer: Any) -> list[int]:
        own = self.options.embedding
        found = list(tokenizer(own.init_word, add_special_tokens=False).input_ids)
        if not found:
            raise UserError(f"{self.flags['init_word']} {own.init_word!r}: has no tokens; name a known word")
        if len(found) > 1 and len(found) != own.num_vectors_per_token:
            logger.warning(
                "%s %s: %d tokens, for %s %d vectors, which start from them in turn",
                *(self.flags["init_word"], own.init_word, len(found)),
                *(self.flags["num_vectors_per_token"], own.num_vectors_per_token),
            )
        return found

    def modules(self) -> Sequence[nn.Module]:
        return [self._rows]

    # ---- files and records ----

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], *, step: int, epoch: int
    ) -> None:
        make_folder(path.parent)
        tensors = self.tensors(dtype)
        if path.suffix == ".safetensors":
            save_tensors(path, tensors, metadata)
        else:
            save_pickle(path, tensors)

    def tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Return copies of the vectors by their published names, in float32 unless another dtype is given."""
        rows = [row.detach().to("cpu", dtype or torch.float32, copy=True).contiguous() for row in self._rows.values()]
        return dict(zip(vector_names(len(rows)), rows, strict=True))

    def rows(self, count: int) -> list[tuple[str, str]]:
        own = self.options.embedding
        start = own.weights or own.init_word
        return [("word", f"{own.token_string}, {own.num_vectors_per_token} tokens, from {start}; {count:,} numbers")]
