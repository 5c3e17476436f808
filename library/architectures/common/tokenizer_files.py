"""Find a tokenizer's files: beside the model, in a folder that the user names, or on the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files.atomic import atomic_path


@dataclass(frozen=True)
class TokenizerKind:
    """The files of a tokenizer."""

    files: tuple[str, ...]
    enough: tuple[tuple[str, ...], ...]  # any one of these sets of files
    hint: str  # for messages
    model: str  # the type in tokenizer.json
    token: str = ""  # in its vocabulary, to tell it from others of the type


_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
CLIP = TokenizerKind(
    files=("tokenizer.json", "vocab.json", "merges.txt", *_SETTINGS),
    enough=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    hint="its vocab.json and merges.txt",
    model="BPE",
)
T5 = TokenizerKind(
    files=("tokenizer.json", "spiece.model", *_SETTINGS),
    enough=(("tokenizer.json",), ("spiece.model",)),
    hint="its tokenizer.json or spiece.model",
    model="Unigram",
)
GEMMA = TokenizerKind(
    files=("tokenizer.json", "tokenizer.model", *_SETTINGS),
    enough=(("tokenizer.json",), ("tokenizer.model",)),
    hint="Gemma's tokenizer.json or tokenizer.model",
    model="BPE",
    token="<start_of_turn>",
)
QWEN = TokenizerKind(
    files=(*CLIP.files, "added_tokens.json"),
    enough=CLIP.enough,
    hint="Qwen2.5-VL's tokenizer.json",
    model="BPE",
    token="<|im_start|>",
)
ALL_FILES = tuple(dict.fromkeys((*CLIP.files, *T5.files, *GEMMA.files, *QWEN.files)))


def has_tokenizer(folder: Path, kind: TokenizerKind = CLIP) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in kind.enough) and _is_kind(folder, kind)


def _is_kind(folder: Path, kind: TokenizerKind) -> bool:
    """Whether the folder's tokenizer.json, if any, is of this kind: folders may hold another encoder's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return True
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], [token["content"] for token in content.get("added_tokens") or ()]
        has_token = not kind.token or kind.token in model["vocab"] or kind.token in added
        return model.get("type", kind.model) == kind.model and has_token
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # the reader of the file reports what is wrong with it


def find_tokenizer(folder: Path, kind: TokenizerKind = CLIP, *, subfolder: str = "tokenizer") -> Path:
    """Return the folder itself, or its ``subfolder``, whichever holds the files.

    Raises:
        UserError: neither does.
    """
    for place in (folder, folder / subfolder):
        if has_tokenizer(place, kind):
            return place
    needed = ", nor ".join(" and ".join(names) for names in kind.enough)
    raise UserError(f"--tokenizer {folder}: has no {needed}; name their folder")


def locate_tokenizer(
    repositories: Sequence[tuple[str, str | None]],
    *,
    model_folder: Path | None,
    cache_dir: str | None,
    subfolder: str = "tokenizer",
    kind: TokenizerKind = CLIP,
    inside: Callable[[], Path | None] = lambda: None,
) -> Path:
    """Return a local folder with the tokenizer's files.

    It looks in the model's own ``subfolder``, in ``cache_dir`` (a sub-folder named after a repository with
    ``/`` as ``_``, or ``cache_dir`` itself), ``inside`` the text encoder's file, then on the Hub, from where it is
    copied into ``cache_dir`` if given.

    Args:
        repositories: (Hub repository, sub-folder in it) of interchangeable tokenizers, in order of preference.
        model_folder: of the model, or of its file.
        inside: returns a folder with the tokenizer that the text encoder's file holds, or None.

    Raises:
        UserError: none of these has it.
    """
    if model_folder is not None and has_tokenizer(model_folder / subfolder, kind):
        return model_folder / subfolder
    if cache_dir is not None:
        named = [Path(cache_dir) / repository.replace("/", "_") for repository, _ in repositories]
        for place in (*named, Path(cache_dir)):
            if has_tokenizer(place, kind):
                return place
    if (folder := inside()) is not None:
        return folder
    repository, fetched = _from_hub(repositories, cache_dir, kind)
    return fetched if cache_dir is None else _copy(fetched, Path(cache_dir) / repository.replace("/", "_"), kind)


def _from_hub(
    repositories: Sequence[tuple[str, str | None]], cache_dir: str | None, kind: TokenizerKind
) -> tuple[str, Path]:
    from huggingface_hub import snapshot_download

    reason = ""
    # tokenizers never change, so the cache is tried first
    for local_only in (True, False):
        for repository, subfolder in repositories:
            prefix = f"{subfolder}/" if subfolder else ""
            patterns = [prefix + name for name in kind.files]
            try:
                snapshot = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=local_only))
            except Exception as error:  # not cached, or offline, which raises many kinds of errors
                reason = type(error).__name__
                continue
            if has_tokenizer(snapshot / prefix, kind):
                return repository, snapshot / prefix
    looked = f'neither in --tokenizer_cache_dir "{cache_dir}" nor' if cache_dir else "not"
    raise UserError(
        f"the tokenizer {repositories[0][0]} is {looked} in the Hub cache, and could not be fetched from the Hub "
        f"({reason}): give --tokenizer_cache_dir a folder that holds {kind.hint}, or run once online"
    )


def _copy(source: Path, target: Path, kind: TokenizerKind) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for name in kind.files:
        if (source / name).is_file():
            with atomic_path(target / name) as part:
                shutil.copyfile(source / name, part)
    return target


def sentencepiece_tokenizer(kind: Any, folder: Path, *, of: str, file: str) -> Any:
    """Load a tokenizer of transformers from its tokenizer.json, or from the published model of sentencepiece.

    Args:
        kind: the tokenizer's class.
        of: the model's name, for messages.
        file: name of the model of sentencepiece.

    Raises:
        UserError: the file is damaged, or the model of sentencepiece cannot be read here.
    """
    if not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder / file}: reading it needs the package sentencepiece, which is not installed; "
            f"pip install sentencepiece, or put {of}'s tokenizer.json beside it"
        )
    try:
        return kind.from_pretrained(str(folder))
    except Exception as error:  # damaged files raise many kinds of errors
        raise UserError(f"{folder}: {of}'s tokenizer cannot be read ({error!r}); download it again") from None
