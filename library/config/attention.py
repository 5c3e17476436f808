"""The options on attention: ``--attn_mode``, ``--split_attn``, ``--sdpa``, ``--xformers``, ``--mem_eff_attn``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from library.config.declaration import Declaration, Facts, Finding, error, idle

#: implementation of attention -> the package that it needs beside torch, and its name in pip
PACKAGES: dict[str, tuple[str, str] | None] = {
    "torch": None,  # torch chooses the kernel
    "xformers": ("xformers", "xformers"),
    "flash": ("flash_attn", "flash-attn"),
    "sageattn": ("sageattention", "sageattention"),
    "flex": None,  # torch's compiled FlexAttention
}


def missing_package(mode: str, flag: str, *, otherwise: str = ", or use --sdpa") -> str | None:
    """Return the error for an implementation whose package is not installed, or ``None``.

    Args:
        otherwise: the end of the advice.
    """
    needed = PACKAGES.get(mode)
    if needed is None or importlib.util.find_spec(needed[0]) is not None:
        return None
    return f"{flag}: the package {needed[0]} is not installed; pip install {needed[1]}{otherwise}"


def attention_that_works(o: Any, facts: Facts) -> Iterator[Finding]:
    t = o.training
    if t.xformers and (missing := missing_package("xformers", "--xformers")):
        yield error(missing)
    if t.attn_mode is None:
        return
    flag = f"--attn_mode {t.attn_mode}"
    if t.attn_mode == "sageattn":
        yield error(f"{flag}: has no backward pass and is for generating only; use torch, xformers, flash or flex")
    elif missing := missing_package(t.attn_mode, flag):
        yield error(missing)
    elif t.attn_mode == "flash" and t.mixed_precision == "no":
        yield error(f"{flag}: works in half precision only; add --mixed_precision bf16, or use --sdpa")


@idle("xformers", "sdpa", "mem_eff_attn", reason="beside --attn_mode, which wins")
def attention_is_named(o: Any) -> bool:
    return o.training.attn_mode is not None


@idle("xformers", "sdpa", reason="beside --mem_eff_attn, which wins")
def memory_efficient_attention_wins(o: Any) -> bool:
    return o.training.mem_eff_attn


@idle("sdpa", reason="beside --xformers, which wins")
def xformers_wins(o: Any) -> bool:
    return o.training.xformers


@idle("split_attn", reason="at --train_batch_size 1 without a dataset file, as there is one image at a time")
def one_at_a_time(o: Any) -> bool:
    return o.dataset.dataset_config is None and o.dataset.train_batch_size == 1


ATTENTION = Declaration(
    rules=(attention_that_works,),
    idle=(attention_is_named, memory_efficient_attention_wins, xformers_wins, one_at_a_time),
)
