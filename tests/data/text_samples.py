"""A stand-in for a family's text encoders, and what cached captions come to."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from library.architectures.conditioning import CaptionLength, Conditioning
from library.architectures.formats import TextFormat
from library.architectures.model_info import WeightsIdentity
from library.config.arguments import ConsoleOptions, DatasetOptions, ModelOptions
from library.data.dataset import TrainingData
from library.interrupt import Interrupt
from library.training.caching import CacheJob
from library.training.text_caching import cache_texts

Make = Callable[..., TrainingData]
Uses = list[tuple[str, str, dict[str, Tensor]]]

ON_DISK: dict[str, Any] = {"cache_text_encoder_outputs_to_disk": True}


@dataclass
class Encoders:
    """Stands for a family: outputs are a function of all that real ones depend on; counts what it encodes."""

    files: str = "files"
    weights: str = "weights"
    width: int = 6
    overflow: bool = False
    encoded: list[int] = field(default_factory=list)  # captions of each call
    loaded: int = 0
    read: int = 0  # how often the weights were read for their identity
    length_option = "max_token_length"
    text = TextFormat("_x_te.npz", {"context": ("T", "D"), "pooled": ("D",), "mask": ("T",), "has_text": ()})

    def text_identity(self, checkpoint: object) -> WeightsIdentity:
        def read() -> str:
            self.read += 1
            return self.weights

        return WeightsIdentity(self.files, read)

    def load_tokenizers(self, checkpoint: object) -> list[str]:
        return ["tokenizer"]

    def load_text_encoders(self, checkpoint: object, *, dtype: torch.dtype, device: str) -> list[str]:
        self.loaded += 1
        return ["encoder"]

    def worded(self, text: str, role: str) -> str:
        return text

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        return CaptionLength(len(caption.split()), 75, "")

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        texts = [f"{max_token_length} {weighted} {caption}".encode() for caption in captions]
        return {"input_ids": torch.tensor([list(hashlib.sha256(text).digest()[:6]) for text in texts])}

    def encode_text(
        self, encoders: Sequence[Any], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        ids = tokens["input_ids"]  # (B, 6)
        self.encoded.append(len(ids))
        context = (ids[:, :, None] + (clip_skip or 0) / 3 + torch.arange(self.width)) / len(self.weights)
        if self.overflow:
            context = context * float("inf")
        return Conditioning(
            {"context": context, "pooled": context.mean(1), "mask": (ids > 99).long(), "has_text": ids[:, 0] > 50}
        )


class OneProcess:
    """The attributes of an accelerator that caching uses."""

    num_processes, process_index, is_main_process, device = 1, 0, True, torch.device("cpu")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def gather_items(self, items: list[Any]) -> list[Any]:
        return items


def fill(
    data: TrainingData,
    encoders: Encoders | None = None,
    *,
    accelerator: Any = None,
    interrupt: Interrupt | None = None,
    dtype: torch.dtype = torch.float32,
    max_token_length: int | None = None,
    clip_skip: int | None = None,
    weighted_captions: bool = False,
    **options: object,
) -> int:
    """Number of captions that were encoded."""
    encoders = encoders or Encoders()
    chosen = SimpleNamespace(
        dataset=DatasetOptions(**{**ON_DISK, **options}),
        model=ModelOptions(max_token_length=max_token_length, clip_skip=clip_skip, weighted_captions=weighted_captions),
        console=ConsoleOptions(console_log_simple=True),
    )
    cache_texts(
        CacheJob(
            architecture=encoders,
            checkpoint=None,
            data=data,
            options=chosen,
            accelerator=accelerator or OneProcess(),
            weight_dtype=dtype,
            interrupt=interrupt or Interrupt(),
        )
    )
    return sum(encoders.encoded)


def uses(data: TrainingData, epochs: Sequence[int] = (0,), workers: int = 0) -> Uses:
    """(image, caption, conditioning) of every use, in order."""
    found = []
    for epoch in epochs:
        for batch in data.dataloader(epoch=epoch, start_batch=0, tokenize=no_tokens, num_workers=workers):
            assert batch.tokens == {}
            for i, path in enumerate(batch.paths):
                row = {name: values[i] for name, values in batch.text.items()}
                found.append((Path(path).name, batch.captions[i], row))
    return found


def no_tokens(captions: Sequence[str]) -> dict[str, Tensor]:
    raise AssertionError("captions were tokenised in training")


def outputs_of(caption: str, encoders: Encoders | None = None, **settings: Any) -> dict[str, Tensor]:
    """Return the encoding of one caption by itself."""
    encoders = encoders or Encoders()
    settings = {"max_token_length": None, "weighted": False, **settings}
    tokens = encoders.tokenize([], [caption], **settings)
    return {name: v[0] for name, v in encoders.encode_text([], tokens, clip_skip=None).tensors.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def options_for(to_disk: bool) -> dict[str, object]:
    return {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": to_disk}
