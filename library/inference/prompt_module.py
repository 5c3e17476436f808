"""Prompts that a Python file makes: ``--from_module``."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from library.errors import UserError
from library.inference.models import ImageModels
from library.inference.options import ImageOptions
from library.inference.plan import SEEDS, Repetition
from library.randomness import key, python_rng

FLAG = "--from_module"


class PromptModule:
    """A file with ``get_prompter(args, models, networks)``.

    The prompter is called as ``prompter(args, models, random, seed, index, step)`` until it returns None, which ends
    the iteration; ``random`` is a ``random.Random``, ``seed`` that of the iteration, ``index`` counts the prompts of
    the iteration and ``step`` those of the run.
    """

    def __init__(self, path: Path, module: ModuleType) -> None:
        self._path, self._module = path, module

    def lines(self, options: ImageOptions, models: ImageModels, how: Repetition) -> Iterator[tuple[str, str, int]]:
        """Yield the name for messages, the line, and the iteration of each prompt.

        Raises:
            UserError: the module returns something else than text.
        """
        args = argparse.Namespace(**{k: v for group in vars(options).values() for k, v in vars(group).items()})
        prompter: Callable[..., Any] = self._module.get_prompter(args, models, list(models.adapters))
        step = 0
        for iteration in range(how.n_iter):
            if how.shuffle_prompts:
                if not hasattr(prompter, "shuffle"):
                    raise UserError(f"{FLAG} {self._path}: --shuffle_prompts needs a prompter with shuffle()")
                prompter.shuffle()
            rng, seed, index = python_rng(how.seed, "prompter", iteration), key(how.seed, iteration) % SEEDS, 0
            while (line := prompter(args, models, rng, seed, index, step)) is not None:
                if not isinstance(line, str):
                    raise UserError(f"{FLAG} {self._path}: the prompter returned {type(line).__name__}, not text")
                yield f"{self._path}, prompt {step + 1}", line, iteration
                index, step = index + 1, step + 1


def read_module(path: Path) -> PromptModule:
    """Import the file.

    Raises:
        UserError: no such file, an error in it, or no ``get_prompter``.
    """
    spec = importlib.util.spec_from_file_location("prompt_module", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"{FLAG} {path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{FLAG} {path}: cannot be imported ({type(error).__name__}: {error})") from None
    if not hasattr(module, "get_prompter"):
        raise UserError(f"{FLAG} {path}: it has no function get_prompter(args, models, networks)")
    return PromptModule(path, module)
