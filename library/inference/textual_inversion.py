"""Textual inversion: words of an embedding file become tokens of the text encoders.

Gal et al. 2022, "An Image is Worth One Word" (arXiv:2208.01618). The file's name without its ending is the word; a file
of several vectors stands for as many tokens.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common.clean_text import clean_text
from library.architectures.common.clip_text import EXPANSIONS
from library.architectures.common.grown_embedding import GrownEmbedding, give_each_layer
from library.errors import UserError
from library.files.safetensors_io import is_pickle, load_tensors
from networks.bundled_words import bundled_words

logger = logging.getLogger(__name__)

#: names of layers in files with vectors for each of them
_LAYER = re.compile(r"(IN|OUT)\d\d|MID")
#: names of the vectors of SDXL's two encoders, in the encoders' order
_OF_SDXL = ("clip_l", "clip_g")


def add_embeddings(paths: Sequence[Path], tokenizers: Sequence[Any], encoders: Sequence[nn.Module]) -> None:
    """Teach the words of embedding files to tokenizers and text encoders, in place.

    Raises:
        UserError: a file that holds no embedding, or one for other encoders; a word that is known already.
    """
    for path in paths:
        word, vectors = path.stem, read_vectors(path, len(encoders))
        for tokenizer, encoder, values in zip(tokenizers, encoders, vectors, strict=True):
            _add(f"--textual_inversion_embeddings {path}", word, values, tokenizer, encoder)
        logger.info('embedding "%s": %d tokens', word, len(vectors[0]))


def add_bundled_words(adapter: Path, tokenizers: Sequence[Any], encoders: Sequence[nn.Module]) -> None:
    """Teach the words within an adapter file to tokenizers and text encoders, in place.

    Raises:
        UserError: see ``add_embeddings``.
    """
    for word, content in bundled_words(adapter).items():
        flag = f"--network_weights {adapter}"
        vectors = vectors_in(content, len(encoders), flag=flag)
        for tokenizer, encoder, values in zip(tokenizers, encoders, vectors, strict=True):
            _add(flag, word, values, tokenizer, encoder)
        logger.info('embedding "%s" of %s: %d tokens', word, adapter, len(vectors[0]))


def add_layered_embeddings(
    paths: Sequence[Path], tokenizer: Any, encoder: nn.Module, layers: Mapping[str, Sequence[nn.Module]]
) -> None:
    """Teach words with other vectors for each layer to a tokenizer and its text encoder, in place; after all others.

    Args:
        layers: the cross-attentions of the denoiser, see ``Architecture.text_layers``; they are changed, too.

    Raises:
        UserError: a file of another kind or for another model; a word that is known already.
    """
    if not paths:
        return
    if not layers:
        raise UserError("--XTI_embeddings: this model has no layers that read texts of their own; give SD 1.x or 2.x")
    table, words, first = encoder.get_input_embeddings(), [], 0
    for path in paths:
        flag = f"--XTI_embeddings {path}"
        rows = in_layer_order(read_layered_vectors(path), layers, flag=flag)
        if rows.shape[1] != table.weight.shape[1]:
            raise UserError(
                f"{flag}: its vectors have {rows.shape[1]} numbers, the text encoder's {table.weight.shape[1]}; it is "
                "for another model"
            )
        words.append(rows.reshape(len(layers), -1, rows.shape[1]))  # (L, tokens, D)
        ids = new_tokens(tokenizer, path.stem, words[-1].shape[1], flag=flag)
        first = first or ids[0]
        setattr(tokenizer, EXPANSIONS, {**getattr(tokenizer, EXPANSIONS, {}), ids[0]: ids})
        logger.info('embedding "%s": %d tokens in each of %d layers', path.stem, len(ids), len(layers))
    joined = torch.cat(words, dim=1).flatten(0, 1).to(table.weight)  # (L * all tokens, D)
    grown = GrownEmbedding(table.weight, nn.Parameter(joined, requires_grad=False), first, len(layers))
    encoder.set_input_embeddings(grown)
    give_each_layer(list(layers.values()))


def vector_names(encoders: int) -> tuple[str, ...]:
    """Return the published names of the vectors of each encoder in a file."""
    return _OF_SDXL if encoders > 1 else ("emb_params",)


def read_vectors(path: Path, encoders: int, *, flag: str = "--textual_inversion_embeddings") -> list[Tensor]:
    """Return the vectors (tokens, width) of each encoder.

    Args:
        flag: the option that named the file, for messages.

    Raises:
        UserError: the file holds no embedding, or not one for so many encoders.
    """
    flag = f"{flag} {path}"
    return vectors_in(_content(path, flag), encoders, flag=flag)


def vectors_in(content: Mapping[str, Any], encoders: int, *, flag: str) -> list[Tensor]:
    """Return the vectors of each encoder in the content of an embedding file; errors as those of ``read_vectors``.

    Args:
        flag: option and file, for messages.
    """
    if any(_LAYER.fullmatch(str(name)) for name in content):
        raise UserError(
            f"{flag}: is an embedding with vectors for each layer (XTI), for train_textual_inversion_XTI.py and "
            "--XTI_embeddings"
        )
    if encoders > 1:
        if not all(_are_vectors(content.get(name)) for name in _OF_SDXL):
            raise UserError(f"{flag}: holds no {' and '.join(_OF_SDXL)}; give an embedding for SDXL")
        found = [content[name] for name in _OF_SDXL]
    else:
        if all(name in content for name in _OF_SDXL):
            raise UserError(f"{flag}: is an embedding for SDXL; give one for this model")
        found = [_only_word(content, flag)]
    vectors = [values.detach().float().reshape(-1, values.shape[-1]) for values in found]
    if len({len(values) for values in vectors}) > 1:
        raise UserError(f"{flag}: holds other numbers of tokens for each text encoder; the file is damaged")
    _check_finite(vectors, flag)
    return vectors


def _only_word(content: Mapping[str, Any], flag: str) -> Tensor:
    """Return the vectors of a file for one text encoder: ``emb_params``, A1111's ``string_to_param``, or diffusers'
    ``{word: vectors}``. Raises UserError: none, or those of several words."""
    inner = content.get("string_to_param", content)
    # early files hold a torch module
    source = inner._parameters if isinstance(inner, nn.ParameterDict) else inner
    words = source if isinstance(source, Mapping) else {}
    found = {str(name): values for name, values in words.items() if _are_vectors(values)}
    for name in ("emb_params", "*"):
        if name in found:
            return found[name]
    if len(found) > 1:
        names = ", ".join(list(found)[:3])
        raise UserError(
            f"{flag}: holds {len(found)} words or tensors ({names}{', ...' if len(found) > 3 else ''}), not one "
            "embedding; give a file of one word"
        )
    if not found:
        raise UserError(f"{flag}: holds no embedding")
    return next(iter(found.values()))


def _are_vectors(values: object) -> bool:
    """Whether these may be vectors (tokens, width), or a single one (width)."""
    return isinstance(values, Tensor) and values.is_floating_point() and values.dim() in (1, 2) and values.numel() > 0


def read_layered_vectors(path: Path, *, flag: str = "--XTI_embeddings") -> dict[str, Tensor]:
    """Return the vectors (tokens, width) of each layer by the layers' names, in the file's order.

    Raises:
        UserError: the file holds no embedding of this kind.
    """
    flag = f"{flag} {path}"
    content = _content(path, flag)
    if not content or not all(_LAYER.fullmatch(str(name)) and _are_vectors(values) for name, values in content.items()):
        raise UserError(f"{flag}: holds no vectors for each layer (IN01 to OUT11); give a file of XTI")
    vectors = {name: values.detach().float().reshape(-1, values.shape[-1]) for name, values in content.items()}
    if len({values.shape for values in vectors.values()}) > 1:
        raise UserError(f"{flag}: holds other sizes for each layer; the file is damaged")
    _check_finite(vectors.values(), flag)
    return vectors


def in_layer_order(vectors: Mapping[str, Tensor], layers: Collection[str], *, flag: str) -> Tensor:
    """Return the vectors (L * tokens, width), layer by layer.

    Args:
        vectors: what ``read_layered_vectors`` gives.
        layers: names of the model's layers, in their order.
        flag: option and file, for messages.

    Raises:
        UserError: the file has other layers than the model.
    """
    if vectors.keys() != set(layers):
        other = sorted(vectors.keys() ^ set(layers))
        raise UserError(f"{flag}: has other layers than the model ({', '.join(other[:3])}); it is for another model")
    return torch.cat([vectors[name] for name in layers])


def _check_finite(vectors: Iterable[Tensor], flag: str) -> None:
    if not all(torch.isfinite(values).all() for values in vectors):
        raise UserError(f"{flag}: holds NaN or infinity; the file is damaged")


def _content(path: Path, flag: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{flag}: no such file")
    return _unpickled(path, flag) if is_pickle(path) else load_tensors(path)


def _unpickled(path: Path, flag: str) -> Mapping[str, Any]:
    """Return the content of a pickled file, of which only plain values and tensors are read; nothing is executed."""
    try:
        with torch.serialization.safe_globals([nn.ParameterDict, nn.Parameter, set]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag}: cannot be read ({reason})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{flag}: holds no embedding")
    return content


def _add(flag: str, word: str, vectors: Tensor, tokenizer: Any, encoder: nn.Module) -> None:
    check_width(flag, vectors, encoder)
    table = encoder.get_input_embeddings()
    ids = new_tokens(tokenizer, word, len(vectors), flag=flag)
    weight = table.weight.detach()
    rows = torch.zeros(max(len(weight), max(ids) + 1), weight.shape[1], dtype=weight.dtype, device=weight.device)
    rows[: len(weight)] = weight
    rows[ids] = vectors.to(rows)
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=True))
    setattr(tokenizer, EXPANSIONS, {**getattr(tokenizer, EXPANSIONS, {}), ids[0]: ids})


def check_width(flag: str, vectors: Tensor, encoder: nn.Module) -> None:
    """Refuse vectors (tokens, width) of another width than the text encoder's; messages begin with ``flag``."""
    width = encoder.get_input_embeddings().weight.shape[1]
    if vectors.shape[1] != width:
        raise UserError(
            f"{flag}: its vectors have {vectors.shape[1]} numbers, the text encoder's {width}; it is for another model"
        )


def new_tokens(tokenizer: Any, word: str, count: int, *, flag: str) -> list[int]:
    """Add a word of so many tokens to a tokenizer; returns their ids.

    Args:
        flag: the option that named the word, for messages.

    Raises:
        UserError: a word that is known already.
    """
    first = as_read(word)
    words = [first, *(f"{first}{number}" for number in range(1, count))]
    known = set(tokenizer.get_vocab())
    if taken := [name for name in words if name in known or f"{name}</w>" in known]:
        raise UserError(f'{flag}: "{taken[0]}" is a known word already; give another name')
    from tokenizers import AddedToken

    # not as a part of longer words
    tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=True) for name in words])
    return list(tokenizer.convert_tokens_to_ids(words))


def as_read(text: str) -> str:
    """Return a word or caption as tokenizers see it: cleaned, in lower case."""
    return clean_text(text).lower()


def finder(word: str) -> re.Pattern[str]:
    """Return a pattern that finds a new word in captions of ``as_read``, where tokenizers find it."""
    return re.compile(rf"(?<!\w){re.escape(as_read(word))}(?!\w)")
