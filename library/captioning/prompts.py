"""The question that a vision-language model is asked about each image."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.captioning.caption_files import caption_path
from library.data.discover import read_caption
from library.errors import UserError, did_you_mean

DEFAULT = "Describe this image in one detailed paragraph, for somebody who cannot see it."

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """A text with fields in braces, which are filled for each image.

    Args:
        text_ending: of the files that ``{text}`` is read from.
    """

    template: str
    text_ending: str

    def __post_init__(self) -> None:
        """Raises UserError for fields that do not exist, and for an empty prompt."""
        if not self.template.strip():
            raise UserError("the prompt is empty: write a question in --prompt or --prompt_file")
        for name in _FIELD.findall(self.template):
            if name not in FIELDS:
                hint = did_you_mean(name, FIELDS) or f"; there are {', '.join(f'{{{field}}}' for field in FIELDS)}"
                raise UserError(f"the prompt has a field {{{name}}}, which is not known{hint}")

    def of(self, image: Path) -> str:
        """Return the prompt of one image. Raises UserError: its text is not UTF-8."""
        return _FIELD.sub(lambda match: FIELDS[match[1]](image, self.text_ending), self.template)


def _text(image: Path, ending: str) -> str:
    path = caption_path(image, ending)
    return read_caption(path) if path.exists() else ""


#: name in braces -> (image, ending of texts) -> what it becomes
FIELDS: Mapping[str, Callable[[Path, str], str]] = {
    "name": lambda image, ending: image.stem,
    "folder": lambda image, ending: image.absolute().parent.name,
    "text": _text,
}


def read_prompt(prompt: str | None, file: str | None, text_ending: str) -> Prompt:
    """Return the prompt of ``--prompt`` or ``--prompt_file``, whose first line may be a comment.

    Raises:
        UserError: both are given; a file that cannot be read; an unknown field.
    """
    if file is None:
        return Prompt(DEFAULT if prompt is None else prompt, text_ending)
    if prompt is not None:
        raise UserError("--prompt and --prompt_file exclude each other: give one of them")
    if not Path(file).is_file():
        raise UserError(f"--prompt_file {file}: no such file")
    first, _, rest = read_caption(file).partition("\n")
    return Prompt(rest if first.startswith("#") else f"{first}\n{rest}".strip(), text_ending)
