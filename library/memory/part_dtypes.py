"""The dtypes of a model's parts, from the flags ``--dtype`` and ``--<part>_dtype`` of the minimal inference scripts.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.errors import UserError, did_you_mean
from library.files.precisions import COMPUTE

#: names of dtypes for ``--dtype`` and the options beside it
COMPUTE_DTYPES = {**COMPUTE, **{name: name for name in ("float32", "float16", "bfloat16")}}
#: names of dtypes of stored weights; fp8 has 4 bits of exponent and 3 of mantissa, with scales where needed
FP8_DTYPES = dict.fromkeys(("fp8", "fp8_e4m3fn", "float8_e4m3fn"), "float8_e4m3fn")


@dataclass(frozen=True)
class PartDtype:
    """The dtypes of storage and computation of one part of the model, as names of torch's dtypes."""

    compute: str
    is_fp8: bool = False

    def __str__(self) -> str:
        return f"fp8 ({self.compute})" if self.is_fp8 else self.compute


def read_part_dtypes(
    dtype: str, given: Mapping[str, str | None], *, without_fp8: Sequence[str] = (), example: str
) -> dict[str, PartDtype]:
    """Return the dtypes of the parts.

    Args:
        dtype: of ``--dtype``.
        given: for each part, of ``--<part>_dtype``.
        without_fp8: parts that cannot be stored in fp8.
        example: a part that can, for the message.

    Raises:
        UserError: unknown names, or fp8 where there is none.
    """
    if dtype in FP8_DTYPES:
        raise UserError(f"--dtype {dtype}: nothing is computed in fp8; keep weights in it with --{example}_dtype fp8")
    base = _dtype("--dtype", dtype, COMPUTE_DTYPES)
    found = {}
    for part, name in given.items():
        if name is None:
            found[part] = PartDtype(base)
        elif name in FP8_DTYPES and part not in without_fp8:
            found[part] = PartDtype(base, is_fp8=True)
        else:
            known = COMPUTE_DTYPES if part in without_fp8 else {**COMPUTE_DTYPES, **FP8_DTYPES}
            found[part] = PartDtype(_dtype(f"--{part}_dtype", name, known))
    return found


def _dtype(flag: str, text: str, known: Mapping[str, str]) -> str:
    if text not in known:
        raise UserError(f"{flag} {text}: unknown; choose from {', '.join(known)}{did_you_mean(text, known)}")
    return known[text]
