"""Finding a CLIP tokenizer's files: beside the model, in a folder the user names, or on the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from library.errors import UserError
from library.files.atomic import atomic_path

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )


def find_tokenizer(folder: Path) -> Path:
    """The folder itself, or its ``tokenizer`` folder, as in a model's; whichever holds the files.

    Raises:
        UserError: neither does.
    """
    for place in (folder, folder / "tokenizer"):
        if has_tokenizer(place):
            return place
    raise UserError(f"--tokenizer {folder}: has no tokenizer.json, nor vocab.json and merges.txt; name their folder")


def locate_tokenizer(
    repositories: Sequence[tuple[str, str | None]],
    *,
    model_folder: Path | None,
    cache_dir: str | None,
    subfolder: str = "tokenizer",
) -> Path:
    """A local folder with the tokenizer's files.

    Looked for in the model's own ``subfolder``, in ``cache_dir`` (a sub-folder named after a repository with
    ``/`` as ``_``, or ``cache_dir`` itself), then on the Hub, from where it is copied into ``cache_dir`` if given.

    Args:
        repositories: (Hub repository, sub-folder in it) of interchangeable tokenizers, in order of preference.

    Raises:
        UserError: none of these has it.
    """
    if model_folder is not None and has_tokenizer(model_folder / subfolder):
        return model_folder / subfolder
    if cache_dir is not None:
        named = [Path(cache_dir) / repository.replace("/", "_") for repository, _ in repositories]
        for folder in (*named, Path(cache_dir)):
            if has_tokenizer(folder):
                return folder
    repository, fetched = _from_hub(repositories, cache_dir)
    return fetched if cache_dir is None else _copy(fetched, Path(cache_dir) / repository.replace("/", "_"))


def _from_hub(repositories: Sequence[tuple[str, str | None]], cache_dir: str | None) -> tuple[str, Path]:
    from huggingface_hub import snapshot_download

    reason = ""
    # the tokenizers never change, so the cache is asked first and no time is lost on the network
    for local_only in (True, False):
        for repository, subfolder in repositories:
            prefix = f"{subfolder}/" if subfolder else ""
            patterns = [prefix + name for name in TOKENIZER_FILES]
            try:
                snapshot = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=local_only))
            except Exception as error:  # not cached; or offline, which shows in many ways
                reason = type(error).__name__
                continue
            if has_tokenizer(snapshot / prefix):
                return repository, snapshot / prefix
    looked = f'neither in --tokenizer_cache_dir "{cache_dir}" nor' if cache_dir else "not"
    raise UserError(
        f"the tokenizer {repositories[0][0]} is {looked} in the Hub cache, and could not be fetched from the Hub "
        f"({reason}): give --tokenizer_cache_dir a folder that holds its vocab.json and merges.txt, or run once online"
    )


def _copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with atomic_path(target / name) as part:
                shutil.copyfile(source / name, part)
    return target
