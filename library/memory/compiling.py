"""Compiling a model's blocks (``--torch_compile`` or ``--compile``, with its settings).

A family names the classes of its blocks. Each block is compiled by itself, adapters included. Blocks of a class are
alike, so the compiler works once for all of them and not on a graph of the whole model. Shapes are static, unless
dynamic ones are asked for: each bucket gets its own code. Modules keep their classes and names, so no ``_orig_mod``
appears in files. What is compiled is the blocks' ``forward``, so that hooks run before it, such as those of
``BlockStream``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from library.errors import UserError, did_you_mean

#: limit of compiled versions of one function: buckets, times training, validation and sampling, times the sizes of
#: blocks of one class
_LIMIT = 1024


def check_backend(backend: str, device: torch.device | str, *, flag: str = "--dynamo_backend") -> None:
    """Refuse a compiler that is not installed; ``flag`` is the option that names it.

    Raises:
        UserError: with what to install or to choose.
    """
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(
            f"{flag} {backend}: torch {torch.__version__} has no such compiler here"
            f"{did_you_mean(backend, known)}; use inductor, or install the package that brings it"
        )
    if backend != "inductor":
        return
    if torch.device(device).type == "cuda":
        if find_spec("triton") is None:
            raise UserError("--torch_compile: the package triton is not installed; pip install triton, or remove it")
    elif shutil.which(os.environ.get("CXX", "")) is None and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UserError(
            "--torch_compile: on a CPU it needs a C++ compiler, and none was found; install g++, or use "
            "--dynamo_backend aot_eager"
        )


@dataclass(frozen=True)
class CompileSettings:
    """The settings of compiling blocks; see ``torch.compile``."""

    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = False  # None: torch decides when sizes change
    fullgraph: bool = False
    recompile_limit: int | None = None  # of one function; None for one that no data set reaches


def compile_blocks(model: nn.Module, classes: Iterable[str], settings: CompileSettings) -> int:
    """Mark the modules of these classes for compilation, in place, and return how many. They are compiled when they
    first run."""
    from torch._dynamo import config

    if settings.recompile_limit is not None:
        config.recompile_limit = settings.recompile_limit
    else:
        config.recompile_limit = max(config.recompile_limit, _LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _LIMIT)
    names = frozenset(classes)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        block.forward = torch.compile(
            block.forward,
            backend=settings.backend,
            mode=settings.mode,
            dynamic=settings.dynamic,
            fullgraph=settings.fullgraph,
        )
    return len(blocks)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules uncompiled within the context: sample images have sizes that are not worth compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield
