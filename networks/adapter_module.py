"""The adapter of one module: hooking into it, merging into its weight, state and norms.

An adapter changes the output of one ``Linear`` or ``Conv2d`` of a frozen model. It replaces the ``forward`` of
that module *instance*, so the model's own weights never become part of the network.

Shape legend: B batch, T tokens, r rank, in/out features or channels, (kh, kw) kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.targets import FoundModule, RankAlpha

_MERGE_STATE = "_adapter_merge"  # attribute of a module whose weight holds merged adapters


@dataclass(frozen=True)
class Dropouts:
    """Probabilities in [0, 1); 0 is off. All act in training mode only."""

    neuron: float = 0.0  # each element of the rank-r activation (``--network_dropout``)
    rank: float = 0.0  # whole ranks, for each sample of the batch
    module: float = 0.0  # the whole adapter, for one forward


@dataclass
class _MergeState:
    """The weight a module had before adapters were merged into it, and those adapters."""

    original_weight: Tensor
    adapters: list[AdapterModule]


def is_method_of(forward: Callable[..., Tensor], module: nn.Module) -> bool:
    """Whether a forward is the one that a module has by its class, which nothing has replaced."""
    return getattr(forward, "__self__", None) is module


def _not_applied(*args: object, **kwargs: object) -> NoReturn:
    """Stand in for the adapted module's forward until the adapter is applied."""
    raise RuntimeError("the adapter is not applied to its module")


class AdapterModule(nn.Module, ABC):
    """The adapter of one module. Subclasses own the parameters and the algebra.

    Attributes:
        scale: alpha / rank, a plain float, so that a step never waits for the device.
        multiplier: strength; 1 as trained.
        enabled: whether the forward applies the adapter.
        trained: whether its parameters get gradients.
        gate: what is left of the change of an output, such as within a region of an image; None leaves all of it.
    """

    alpha: Tensor  # () float; saved with the weights

    def __init__(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float = 1.0, dropouts: Dropouts = Dropouts()
    ) -> None:
        super().__init__()
        self.lora_name = found.lora_name
        self.rank = size.rank
        self.multiplier = multiplier
        self.dropouts = dropouts
        self.enabled = True
        self.trained = True
        self.gate: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("alpha", torch.tensor(float(size.alpha), dtype=torch.float32))
        self.scale = float(size.alpha) / size.rank
        self._original_forward: Callable[..., Tensor] = _not_applied
        self.bind(found.module)

    # ---- the adapted module ----

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def bind(self, module: nn.Module) -> None:
        """Adapt another ``module`` from now on; call it before ``apply``."""
        self._original = (module,)  # in a tuple, because nn.Module would register it as a submodule

    @property
    def is_applied(self) -> bool:
        return self._original_forward is not _not_applied

    def apply_to_original(self) -> None:
        if self.is_applied:
            raise RuntimeError(f"{self.lora_name} is applied already")
        self._original_forward = self.original.forward
        self.original.forward = self.forward

    def remove_from_original(self) -> None:
        """Remove the hook. Networks stacked on one model are removed in reverse order."""
        if self.original.__dict__.get("forward") != self.forward:
            raise RuntimeError(f"{self.lora_name} is not the outermost adapter of its module")
        previous = self._original_forward
        if is_method_of(previous, self.original):
            del self.original.forward  # back to the class's method
        else:
            self.original.forward = previous
        self._original_forward = _not_applied

    # ---- forward ----

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.enabled or self.is_merged:
            return self._original_forward(x, *args, **kwargs)
        if self.training and self.dropouts.module and self.is_left_out():
            return self._original_forward(x, *args, **kwargs)
        if self.gate is not None:
            plain = self._original_forward(x, *args, **kwargs)
            return plain + self.gate(self.changed_output(x, *args, **kwargs) - plain)
        return self.changed_output(x, *args, **kwargs)

    def is_left_out(self) -> bool:
        """Draw whether module dropout skips the adapter in this forward pass."""
        # a draw on the CPU does not wait for the device; checkpointed blocks replay it
        return torch.rand((), device="cpu").item() < self.dropouts.module

    def changed_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the adapted module for input ``x``."""
        return self.add_change(self._original_forward(x, *args, **kwargs), x)

    @abstractmethod
    def add_change(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the module's output ``out`` for input ``x``, changed by the adapter; same shape and dtype."""

    # ---- merging ----

    @abstractmethod
    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """Return the change of the module's weight, float32, in the weight's shape, by default at the own
        multiplier."""

    @property
    def base_weight(self) -> Tensor:
        """Return the module's weight before any merging."""
        state = self.original.__dict__.get(_MERGE_STATE)
        return self.original.weight if state is None else state.original_weight

    def _own_weight(self) -> nn.Parameter:
        """Return the module's weight for a change in place. Raises UserError if it is computed from a smaller form."""
        weight = self.original.weight
        if not isinstance(weight, nn.Parameter):
            raise UserError(
                f"{self.lora_name}: its module's weight is kept in fp8 or fewer bits, into which nothing can be "
                "merged; merge into the model as it is in its file"
            )
        return weight

    @property
    def has_merged_weight(self) -> bool:
        """Whether any adapter is merged into the module's weight."""
        return _MERGE_STATE in self.original.__dict__

    @property
    def is_merged(self) -> bool:
        state = self.original.__dict__.get(_MERGE_STATE)
        return state is not None and any(adapter is self for adapter in state.adapters)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to the module's weight and keep the original weight for ``unmerge``."""
        if self.is_merged:
            raise RuntimeError(f"{self.lora_name} is merged already")
        weight = self._own_weight()
        state = self.original.__dict__.setdefault(_MERGE_STATE, _MergeState(weight.data, []))
        state.adapters.append(self)
        weight.data = _merged(state.original_weight, state.adapters, weight.dtype, weight.device)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo ``merge``: without the last merged adapter the weight is bit for bit as before."""
        if not self.is_merged:
            raise RuntimeError(f"{self.lora_name} is not merged")
        weight = self.original.weight
        state: _MergeState = self.original.__dict__[_MERGE_STATE]
        state.adapters[:] = [adapter for adapter in state.adapters if adapter is not self]
        if state.adapters:
            weight.data = _merged(state.original_weight, state.adapters, weight.dtype, weight.device)
        else:
            weight.data = state.original_weight.to(weight.device)
            del self.original.__dict__[_MERGE_STATE]

    # ---- state ----

    def set_alpha(self, alpha: float) -> None:
        self.alpha.fill_(alpha)
        self.scale = alpha / self.rank

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        alpha = state_dict.get(f"{prefix}alpha")
        if alpha is not None and not alpha.is_meta:
            self.scale = float(alpha) / self.rank

    # ---- norms ----

    @abstractmethod
    def change_norm(self) -> Tensor:
        """Return the Frobenius norm of the weight change at multiplier 1, a float32 scalar on the parameters'
        device."""

    @abstractmethod
    def scale_change(self, ratio: Tensor) -> None:
        """Multiply the weight change by ``ratio``, a scalar, in place."""


@torch.no_grad()
def merge_all_forever(
    adapters: Iterable[AdapterModule],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Add the changes of many adapters to their modules' weights, without keeping a copy.

    Each change is computed from the present weight, so the order of several adapters of one module does not matter, and
    the result equals applying them together.

    Args:
        device: device of the float32 sums; weights stay where they are.
        dtype: of the resulting weights; default: as they are.
    """
    by_module: dict[int, list[AdapterModule]] = {}
    for adapter in adapters:
        by_module.setdefault(id(adapter.original), []).append(adapter)
    for stacked in by_module.values():
        weight = stacked[0]._own_weight()
        weight.data = _merged(weight.data, stacked, dtype or weight.dtype, device or weight.device)


def _merged(
    weight: Tensor, adapters: Iterable[AdapterModule], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return ``weight`` plus the adapters' changes, summed in float32 on ``device``, on the device of ``weight``."""
    total = weight.to(device=device, dtype=torch.float32)
    for adapter in adapters:
        total = total + adapter.get_weight().to(device)
    return total.to(device=weight.device, dtype=dtype)
