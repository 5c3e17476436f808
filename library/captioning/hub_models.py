"""Find and load models that describe images: local folders, the Hub and its cache, through transformers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.architectures.common.diffusers_folder import hub_snapshot
from library.errors import UserError

if TYPE_CHECKING:
    import torch

#: what a model of transformers may need beside its weights
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.jsonl")


def model_folder(path_or_id: str, flag: str) -> Path:
    """Return the folder of a model, after downloading it if it is not here.

    Raises:
        UserError: no such folder; offline and not in the Hub's cache.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{flag} {path_or_id}: is a file; name the model's folder, or its id on the Hub")
    if path_or_id.count("/") != 1 or path_or_id.startswith(("/", ".", "~")):
        raise UserError(f"{flag} {path_or_id}: no such folder here, and ids on the Hub are owner/name")
    return hub_snapshot(path_or_id, _wanted, flag=flag)


def _wanted(names: Collection[str]) -> Sequence[str]:
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
    return (*_SMALL, weights)


def load_pretrained(kind: Any, folder: Path, flag: str, **more: Any) -> Any:
    """Load a model or a processor of transformers from a folder.

    Args:
        kind: a class with ``from_pretrained``.

    Raises:
        UserError: the folder has none that this class can load.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **more)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"{flag} {folder}: transformers' {name} cannot load it ({first[:300]})") from None


def device_for(given: str | None) -> torch.device:
    """Return the device of ``--device``; CUDA if there is one, otherwise the CPU. Raises UserError: no such device."""
    import torch

    from library.config.devices import parse_device

    return parse_device("--device", given or ("cuda" if torch.cuda.is_available() else "cpu"))


def seed_batch(seed: int, names: Sequence[str]) -> None:
    """Seed torch for sampling the texts of a batch: a function of the seed and the images' names."""
    import torch

    from library.randomness import key

    torch.manual_seed(key(seed, "captions", *names))
