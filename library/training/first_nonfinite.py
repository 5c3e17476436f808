"""Find the first module with an output that is not finite. It waits for the device and is for inspecting one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """A module with an output that is not finite."""

    module: str  # dotted name
    kind: str  # its class
    input_norm: float  # over all its inputs
    output_norm: float  # over the finite values of its outputs
    bad_values: int
    values: int
    parameter_norm: float

    def text(self) -> str:
        """Return two lines, the second with a hint."""
        where = "its parameters are" if not self.parameter_norm < float("inf") else "its input is"
        made = self.input_norm < float("inf") and self.parameter_norm < float("inf")
        hint = "input and parameters are finite, so it originates here" if made else f"{where} not finite already"
        return (
            f"first not finite: {self.module} ({self.kind}), {self.bad_values} of {self.values} values\n"
            f"  norms: input {self.input_norm:g}, parameters {self.parameter_norm:g}, finite output "
            f"{self.output_norm:g}; {hint}"
        )


class FirstNonFinite:
    """A context that watches the forward passes of modules.

    ``found`` is the first module to end its forward pass with a value that is not finite: of nested ones the innermost.

    Args:
        roots: by name; their submodules are watched, too.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self.found: Finding | None = None
        self._roots = roots
        self._hooks: list[Any] = []

    def __enter__(self) -> FirstNonFinite:
        for root, module in self._roots.items():
            for name, part in module.named_modules():
                full = f"{root}.{name}" if name else root
                self._hooks.append(part.register_forward_hook(self._watch(full), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.found is not None:
                return
            outputs = list(_tensors(output))
            bad = sum(int((~t.isfinite()).sum()) for t in outputs)
            if bad:
                finite = [torch.where(t.isfinite(), t, torch.zeros_like(t)) for t in outputs]
                self.found = Finding(
                    name,
                    type(module).__name__,
                    input_norm=_norm(_tensors((args, kwargs))),
                    output_norm=_norm(finite),
                    bad_values=bad,
                    values=sum(t.numel() for t in outputs),
                    parameter_norm=_norm(module.parameters(recurse=False)),
                )

        return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors within tuples, lists, dicts and the libraries' output classes."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _norm(tensors: Any) -> float:
    # float64, in which squares of float32 do not overflow
    return sum(float(t.detach().double().norm()) ** 2 for t in tensors) ** 0.5
