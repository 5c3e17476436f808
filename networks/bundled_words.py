"""Embeddings within adapter files: ``bundle_emb.<word>.<vectors>``, as ComfyUI and A1111 read them.

The vectors of a single text encoder are called ``string_to_param.*``, those of SDXL ``clip_l`` and ``clip_g``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.files.hashes import with_hashes
from library.files.safetensors_io import (
    is_pickle,
    load_pickle,
    load_tensors,
    read_header,
    save_pickle,
    save_tensors,
)

_PREFIX = "bundle_emb."
#: the name of a single encoder's vectors in files of their own -> in bundles
_BUNDLED = {"emb_params": "string_to_param.*"}


def bundled(word: str, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vectors of a word by their names within an adapter file.

    Args:
        vectors: by their names in an embedding file.
    """
    return {f"{_PREFIX}{word}.{_BUNDLED.get(name, name)}": values for name, values in vectors.items()}


def is_bundled(name: str) -> bool:
    """Whether a tensor of an adapter file belongs to a word."""
    return name.startswith(_PREFIX)


def bundled_words(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return word -> its vectors by their names in embedding files, of all words in an adapter file."""
    if is_pickle(path):
        weights: Mapping[str, Tensor] = {n: t for n, t in load_pickle(path).items() if is_bundled(n)}
    else:
        names = [name for name in read_header(path).tensors if is_bundled(name)]
        weights = {name: tensor for name, tensor in load_tensors(path).items() if is_bundled(name)} if names else {}
    back = {theirs: ours for ours, theirs in _BUNDLED.items()}
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, values in weights.items():
        word, _, rest = name.removeprefix(_PREFIX).partition(".")
        found[word][back.get(rest, rest)] = values
    return dict(found)


def write_with_words(adapter: Path, target: Path, words: Mapping[str, Tensor]) -> None:
    """Write an adapter file with the tensors of ``bundled`` to another place, with its metadata."""
    if is_pickle(adapter):
        save_pickle(target, {**load_pickle(adapter), **words})
        return
    joined = {**load_tensors(adapter), **words}
    save_tensors(target, joined, with_hashes(joined, read_header(adapter).metadata))
