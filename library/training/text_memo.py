"""Encoded captions of a frozen text encoder, kept so that each distinct caption is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from library.architectures.base import Conditioning


class TextMemo:
    """Remembers conditioning by the exact tokens, within a memory budget on the host.

    Only for encoders that do not change during the run: the result is then a function of the tokens.
    """

    def __init__(self, encode: Callable[[dict[str, Tensor]], Conditioning], *, max_bytes: int = 512 * 1024**2) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[bytes, Conditioning] = OrderedDict()

    def __call__(self, tokens: Mapping[str, Tensor], device: torch.device) -> Conditioning:
        """Token tensors on the host, batch first, to conditioning on ``device``."""
        batch_size = next(iter(tokens.values())).shape[0]
        parts = [self._one({name: t[i : i + 1] for name, t in tokens.items()}, device) for i in range(batch_size)]
        return Conditioning.cat(parts) if len(parts) > 1 else parts[0]

    def _one(self, tokens: dict[str, Tensor], device: torch.device) -> Conditioning:
        name = b"|".join(tokens[key].contiguous().numpy().tobytes() for key in sorted(tokens))
        known = self._known.get(name)
        if known is not None:
            self._known.move_to_end(name)
            return known.to(device)
        made = self._encode({key: t.to(device) for key, t in tokens.items()})
        kept = made.to("cpu")
        self._known[name] = kept
        self._bytes += _size(kept)
        while self._bytes > self._max_bytes and len(self._known) > 1:
            _, dropped = self._known.popitem(last=False)
            self._bytes -= _size(dropped)
        return made


def _size(conditioning: Conditioning) -> int:
    return sum(t.numel() * t.element_size() for t in conditioning.tensors.values())
