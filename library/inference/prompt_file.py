"""Files of prompts: a prompt on each line, or for sample images also a table or an object for each.

This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from library.config import prompt_options as read
from library.config.prompt_options import DDPM_FIELDS, PromptOption
from library.config.toml_file import load_toml
from library.errors import UserError, did_you_mean
from library.inference.prompt_line import (
    ImagePrompt,
    SamplePrompt,
    SampleReader,
    parse_image_prompt,
)


def read_minimal_prompts(path: Path, parse: Callable[[str, str], ImagePrompt]) -> list[ImagePrompt]:
    """Read a ``.txt`` file of prompts for a minimal inference script: one per line, without blank and ``#`` lines.

    Args:
        parse: (line, its name in messages) -> prompt.

    Raises:
        UserError: file missing, not text, empty, or a line is wrong.
    """
    return _not_empty([parse(line, where) for where, line in _lines(path)], path)


def read_image_prompts(
    path: Path, *, size_multiple: int = 8, options: Sequence[PromptOption] = ()
) -> list[ImagePrompt]:
    """Read a ``.txt`` file of prompts for ``gen_img.py``: one per line, without blank and ``#`` lines.

    Raises:
        UserError: file missing, not text, empty, or a line is wrong.
    """
    read_line = partial(parse_image_prompt, size_multiple=size_multiple, options=options)
    return _not_empty([read_line(line, where=where) for where, line in _lines(path)], path)


def read_prompt_file(
    path: Path, *, size_multiple: int = 8, used: Collection[str] = DDPM_FIELDS, own: Sequence[PromptOption] = ()
) -> list[SamplePrompt]:
    """Read the sample prompts of training.

    ``.txt`` has a prompt per line; blank and ``#`` lines are skipped. ``.toml`` has a table ``[prompt]``
    of common settings and a table ``[[prompt.subset]]`` per prompt. ``.json`` is a list of lines or of objects.
    The keys of tables and objects are the options' fields. Arguments are those of ``parse_prompt_line``.

    Raises:
        UserError: file missing or damaged, unknown key or option, bad value, no prompt; names file and place.
    """
    path, reader = Path(path), SampleReader(size_multiple, used, own)
    suffix = path.suffix.lower()
    if suffix == ".toml":
        prompts = _read_toml(path, reader)
    elif suffix == ".json":
        prompts = _read_json(path, reader)
    elif suffix == ".txt":
        prompts = [reader.line(line, where) for where, line in _lines(path)]
    else:
        raise UserError(f"{path}: a prompt file ends with .txt, .toml or .json")
    return _not_empty(prompts, path)


# ---- lines ----


def _lines(path: Path) -> list[tuple[str, str]]:
    """Yield non-empty lines, each with ``file:number``."""
    numbered = enumerate(_read_text(path).splitlines(), start=1)
    return [(f"{path}:{n}", line) for n, line in numbered if line.strip() and not line.lstrip().startswith("#")]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the prompt file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _not_empty(prompts: list[Any], path: Path) -> list[Any]:
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


# ---- tables and objects ----


def _read_toml(path: Path, reader: SampleReader) -> list[SamplePrompt]:
    document = load_toml(path)
    for name in document:
        if name != "prompt":
            raise UserError(f'{path}: unknown table or key "{name}"{did_you_mean(name, ["prompt"])}; use [prompt]')
    common = document.get("prompt", {})
    if not isinstance(common, dict):
        raise UserError(f"{path}: prompt must be a table, [prompt]")
    common = dict(common)
    subsets = common.pop("subset", None)
    if subsets is None:
        return [_from_object(common, f"{path}: [prompt]", reader)] if common else []
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"{path}: prompt.subset must be tables, [[prompt.subset]]")
    return [
        _from_object({**common, **subset}, f"{path}: [[prompt.subset]] {n}", reader)
        for n, subset in enumerate(subsets, start=1)
    ]


def _read_json(path: Path, reader: SampleReader) -> list[SamplePrompt]:
    try:
        document = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(document, list):
        raise UserError(f"{path}: must be a list of prompt lines or of objects")
    prompts = []
    for n, item in enumerate(document, start=1):
        where = f"{path}: item {n}"
        if isinstance(item, str):
            prompts.append(reader.line(item, where))
        elif isinstance(item, dict):
            prompts.append(_from_object(item, where, reader))
        else:
            raise UserError(f"{where}: must be a prompt line or an object")
    return prompts


def _from_object(values: Mapping[str, Any], where: str, reader: SampleReader) -> SamplePrompt:
    readers = {option.field: option.read for option in reader.options} | {"prompt": read.text}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in readers:
            raise UserError(f'{where}: unknown key "{name}"{did_you_mean(name, readers)}')
        if value is None:  # JSON null: not set
            continue
        # a boolean is an int in Python, but never valid here
        text_wanted = readers[name] in (read.text, read.path, read.sampler)
        if isinstance(value, bool) or not isinstance(value, str if text_wanted else (int, float, str)):
            wanted = "text" if text_wanted else "a number"
            raise UserError(f"{where}: {name} = {json.dumps(value, default=str)}: {wanted} is needed")
        try:
            found[name] = readers[name](str(value))
        except ValueError as error:
            raise UserError(f"{where}: {name} = {json.dumps(value)}: {error}") from None
    if "prompt" not in found:
        raise UserError(f'{where}: has no "prompt"')
    return reader.prompt(found.pop("prompt"), found, where, None)
