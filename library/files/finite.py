"""Find NaN and infinity in weights while the weights are read, with one pass over each tensor.

A sum is the cheapest pass, and NaN and infinity survive in it. The sum of finite numbers may overflow, so a tensor
whose sum is not finite is checked exactly. On an accelerator sums wait on the device,
and are read together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class FiniteCheck:
    """Collects tensors one by one and reports at the end which of them are not finite."""

    def __init__(self) -> None:
        self._bad: list[str] = []
        self._waiting: list[tuple[str, Tensor, Tensor]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; integers and tensors without data are finite."""
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            return
        if tensor.element_size() == 1:  # fp8, which torch cannot sum
            tensor = tensor.bfloat16()
        total = tensor.sum()
        if tensor.device.type != "cpu":
            self._waiting.append((name, tensor, total))
        elif not total.isfinite() and not is_finite(tensor):
            self._bad.append(name)

    def bad(self) -> list[str]:
        """Return the names of the tensors that hold NaN or infinity, in the order of ``add``."""
        import torch

        if self._waiting:
            # one transfer from the device for all
            fine = torch.stack([total.float() for _, _, total in self._waiting]).isfinite().tolist()
            suspicious = [entry for entry, is_fine in zip(self._waiting, fine, strict=True) if not is_fine]
            self._bad += [name for name, tensor, _ in suspicious if not is_finite(tensor)]
            self._waiting = []
        return list(self._bad)


def finite_flag(tensor: Tensor) -> Tensor:
    """Return whether all of a tensor's numbers are finite, exactly, as a 0-dim bool on its device.

    The extremes hold every infinity, and are NaN if any number is; ``isfinite`` of the whole tensor makes copies of it.
    """
    return tensor.amin().isfinite() & tensor.amax().isfinite()


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite, exactly."""
    return bool(finite_flag(tensor))


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold NaN or infinity."""
    check = FiniteCheck()
    for name, tensor in tensors:
        check.add(name, tensor)
    return check.bad()


def some_of(names: list[str]) -> str:
    """Return ``"3 tensors, the first is a.weight,"`` or ``"the tensor a.weight"``, for messages."""
    return f"the tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors, the first is {names[0]},"
