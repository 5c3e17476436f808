"""The base of LoRA modules whose halves are several parameters, which are trained or frozen separately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from networks.lora_module import LoraModule


class LoraInPieces(LoraModule):
    """Low-rank change with the parameters ``down_0``, ``up_0``, ``down_1``, ...; in states and files they are joined.

    Subclasses call ``take_apart`` when they are made; their ``halves`` and ``_load_from_state_dict`` define how the
    pieces form the halves.
    """

    def take_apart(self, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
        """Replace the two halves by these pieces, the same number of each."""
        del self.lora_down, self.lora_up
        self._piece_count = len(downs)
        for number, (down, up) in enumerate(zip(downs, ups, strict=True)):
            self.register_parameter(f"down_{number}", nn.Parameter(down.detach().clone()))
            self.register_parameter(f"up_{number}", nn.Parameter(up.detach().clone()))

    def pieces(self, half: str) -> list[nn.Parameter]:
        """Return the pieces of the half "down" or "up", in order."""
        return [self._parameters[f"{half}_{number}"] for number in range(self._piece_count)]

    def up_parameters(self) -> list[nn.Parameter]:
        return self.pieces("up")

    def scale_change(self, ratio: Tensor) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio.sqrt())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters:
            del destination[prefix + name]
        for half, joined in zip(("down", "up"), self.halves(), strict=True):
            destination[f"{prefix}lora_{half}.weight"] = joined if keep_vars else joined.detach()
