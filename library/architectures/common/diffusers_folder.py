"""Diffusers folders and Hub repositories: find and download the files of a component."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from library.errors import UserError

#: weight file names of a component in order of preference; half-precision variants come last
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")
WEIGHT_NAMES = tuple(f"{stem}{variant}{suffix}" for variant in ("", ".fp16") for suffix in _SUFFIXES for stem in _STEMS)


#: of weights in several files, not of their variants in half precision
_SHARD = re.compile(r"\w+-\d{5}-of-\d{5}\.safetensors")

HUB_TIMEOUT = 10.0  # seconds to wait for the Hub's answer before the cache is used


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; download the folder again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content


def choose_weights(names: Collection[str]) -> str | None:
    """Return the preferred weight file among the names in one component's folder."""
    variant = _variant.get()
    first = () if variant is None else tuple(f"{stem}.{variant}{s}" for s in _SUFFIXES for stem in _STEMS)
    return next((name for name in (*first, *WEIGHT_NAMES) if name in names), None)


#: what ``preferring`` chose
_variant: ContextVar[str | None] = ContextVar("variant", default=None)


@contextmanager
def preferring(variant: str | None) -> Iterator[None]:
    """Read the weights of this variant, such as fp16, within, where a folder has them beside others."""
    token = _variant.set(variant)
    try:
        yield
    finally:
        _variant.reset(token)


def weight_file(folder: Path) -> Path:
    """Return the weight file of a component.

    Raises:
        UserError: there is none.
    """
    chosen = choose_weights({entry.name for entry in folder.iterdir()} if folder.is_dir() else ())
    if chosen is None:
        raise UserError(f"{folder}: no weight file (model.safetensors, diffusion_pytorch_model.safetensors or .bin)")
    return folder / chosen


def is_hub_id(text: str) -> bool:
    """Whether ``text`` can be a Hub repository, ``owner/name``."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith(".")


def download_components(repository: str, components: Iterable[str], *, flag: str) -> Path:
    """Download the needed files of a Hub repository, or use the local cache when offline.

    Args:
        components: sub-folders; ``""`` stands for weight files at the root.
        flag: the option that named the repository, for messages.

    Raises:
        UserError: unknown repository, or offline and not in the cache.
    """
    return hub_snapshot(repository, lambda names: _wanted(names, components), flag=flag)


def hub_file(repository: str, name: str, *, flag: str) -> Path:
    """Download one file of a Hub repository, or use the local cache when offline.

    Raises:
        UserError: unknown repository, a file that it does not have, or offline and not in the cache.
    """
    path = hub_snapshot(repository, lambda names: [name], flag=flag) / name
    if not path.is_file():
        raise UserError(f"{flag} {repository}: has no {name}")
    return path


def hub_snapshot(repository: str, choose: Callable[[Collection[str]], Sequence[str]], *, flag: str) -> Path:
    """Download the chosen files of a Hub repository, or use the local cache when offline.

    Args:
        choose: the names of all its files -> patterns of those that are needed.
        flag: the option that named the repository, for messages.

    Raises:
        UserError: unknown repository, or offline and not in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        found = HfApi().model_info(repository, timeout=HUB_TIMEOUT).siblings or []
        names = {file.rfilename for file in found}
        return Path(snapshot_download(repository, allow_patterns=choose(names)))
    except GatedRepoError:
        raise UserError(
            f"{flag} {repository}: access must be requested on the Hub; then log in with: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{flag} {repository}: no such file or folder here, and no such repository on the Hub"
        ) from None
    except Exception as error:  # offline shows in many ways: DNS, proxy, timeout, HF_HUB_OFFLINE
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except LocalEntryNotFoundError:
            reason = type(error).__name__
            raise UserError(
                f"{flag} {repository}: no such file or folder here, not in the Hub cache, and the Hub cannot be "
                f"reached ({reason}); give a local path, or download it once while online"
            ) from None


def _wanted(names: Collection[str], components: Iterable[str]) -> list[str]:
    wanted = ["model_index.json"]
    for component in components:
        prefix = f"{component}/" if component else ""
        inside = {name[len(prefix) :] for name in names if name.startswith(prefix)}
        inside = {name for name in inside if "/" not in name}
        wanted += [prefix + name for name in inside if name.endswith((".json", ".txt"))]
        if weights := choose_weights(inside):
            wanted.append(prefix + weights)
        else:
            wanted += [prefix + name for name in inside if _SHARD.fullmatch(name)]
    return wanted
