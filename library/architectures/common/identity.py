"""Identify the weights that something was made with, for the stamps of caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.architectures.common.loading import ModelSource
from library.architectures.common.tokenizer_files import ALL_FILES
from library.architectures.model_info import WeightsIdentity
from library.files.hashes import file_identity

if TYPE_CHECKING:
    from hashlib import _Hash


def add_weights(digest: _Hash, source: ModelSource, *, only: tuple[str, ...] = ("",)) -> None:
    """Add names, dtypes, shapes and bytes of a model's tensors, in the order of the model's names.

    Args:
        only: beginnings of the names that count.
    """
    names = {file: source.layout.model_names(file) for file in source.file_names()}
    chosen = sorted((f for f, models in names.items() if models[0].startswith(only)), key=lambda file: names[file])
    for name, tensor in source.layout.read(source.file.read(chosen)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def weights_identity(sources: Sequence[ModelSource], tokenizer_folders: Sequence[Path]) -> WeightsIdentity:
    """Return the identity of models with their configurations and tokenizers.

    Tokenizer files are small, so both texts contain their content.
    """
    about = hashlib.sha256()
    for source in sources:
        about.update(json.dumps(source.config, sort_keys=True, default=str).encode())
    for folder in tokenizer_folders:
        for name in ALL_FILES:
            if (folder / name).is_file():
                about.update(name.encode())
                about.update((folder / name).read_bytes())

    def read() -> str:
        digest = about.copy()
        for source in sources:
            add_weights(digest, source)
        return f"sha256:{digest.hexdigest()}"

    files = about.copy()
    for path in (path for source in sources for path in sorted(source.file.files)):
        files.update(json.dumps(file_identity(path)).encode())
    return WeightsIdentity(f"sha256:{files.hexdigest()}", read)
