"""Refuse damaged adapter files, which would otherwise train, merge or generate without a message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from library.errors import UserError
from library.files.finite import FiniteCheck, some_of

#: tensors of a low-rank module; its strength is alpha / rank, so alpha must not be 0
_LOW_RANK = (".lora_down.weight", ".lora_A.weight", ".hada_w1_a")


def refuse_damaged(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], title: str) -> None:
    """Refuse weights that are integers or not finite, and alphas that are not one number other than 0.

    Args:
        tensors: of one file, which ``title`` names in the error.

    Raises:
        UserError: naming the first tensor of the kind.
    """
    check = FiniteCheck()
    zero_alphas: list[str] = []
    low_rank: set[str] = set()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if name.endswith(".alpha"):
            if tensor.numel() != 1:
                raise UserError(f"{title}: {name}: holds {tensor.numel()} numbers, and an alpha is one; it is damaged")
            if not tensor.is_meta and not float(tensor):
                zero_alphas.append(name)
        elif tensor.dim() > 1 and not tensor.is_floating_point():
            what = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{title}: {name} holds {what} numbers, which are not weights; the file is damaged")
        low_rank.update(_modules_of_low_rank(name))
        check.add(name, tensor)
    if bad := check.bad():
        raise UserError(
            f"{title}: {some_of(bad)} holds NaN or infinity; the file is damaged, or comes from a run that failed: "
            "use another"
        )
    if idle := [name for name in zero_alphas if name.removesuffix(".alpha") in low_rank]:
        raise UserError(
            f"{title}: {some_of(idle)} is 0, with which the adapter changes nothing (its strength is alpha / rank); "
            "use another file, or set its alpha"
        )


def _modules_of_low_rank(name: str) -> Iterator[str]:
    yield from (name.removesuffix(ending) for ending in _LOW_RANK if name.endswith(ending))
