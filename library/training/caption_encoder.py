"""Turn the captions of a batch into conditioning: from a cache, remembered, or encoded now."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning
from library.architectures.ragged import trimmed
from library.data.batch import Batch


class CaptionEncoder:
    """Encodes the captions of batches.

    Args:
        encoders: ``None`` for those whose outputs come from a cache.
        device: of the encoders.
        trains: whether gradients flow into the encoders, called for each batch. Without gradients each distinct caption
            is encoded once.
    """

    def __init__(
        self,
        architecture: Architecture,
        encoders: Sequence[nn.Module | None],
        *,
        device: torch.device,
        clip_skip: int | None,
        trains: Callable[[], bool],
    ) -> None:
        self._architecture = architecture
        self._encoders = encoders
        self._device = device
        self._clip_skip = clip_skip
        self._trains = trains
        self._memo = None if trains() else TextMemo(self.encode, architecture.text.ragged)

    def __call__(self, batch: Batch) -> Conditioning:
        """Return the conditioning of a batch, without the part that depends on its images."""
        if batch.text is not None:
            # some encoders may be trained beside the cached outputs of the others
            fresh = self.encode(self._moved(batch.tokens)).tensors if batch.tokens else {}
            return Conditioning({**batch.text, **fresh})
        if self._memo is not None:
            return self._memo(batch.tokens, self._device)
        return self.encode(self._moved(batch.tokens))

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """Encode token tensors on the encoders' device, with a graph where encoders are trained."""
        with torch.set_grad_enabled(self._trains() and torch.is_grad_enabled()):
            return self._architecture.encode_text(self._encoders, tokens, clip_skip=self._clip_skip)

    def _moved(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self._device, non_blocking=True) for name, t in tokens.items()}


class TextMemo:
    """Remembers conditioning by tokens, within a memory budget on the host.

    Only for encoders that do not change during the run: the result is then a function of the tokens.
    """

    def __init__(
        self,
        encode: Callable[[dict[str, Tensor]], Conditioning],
        ragged: Mapping[str, str] = MappingProxyType({}),
        *,
        max_bytes: int = 512 * 1024**2,
    ) -> None:
        self._encode = encode
        self._ragged = ragged
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[bytes, Conditioning] = OrderedDict()

    def __call__(self, tokens: Mapping[str, Tensor], device: torch.device) -> Conditioning:
        """Return conditioning on ``device`` for token tensors on the host, batch first."""
        batch_size = next(iter(tokens.values())).shape[0]
        parts = [self._one({name: t[i : i + 1] for name, t in tokens.items()}, device) for i in range(batch_size)]
        return Conditioning.cat(parts) if len(parts) > 1 else parts[0]

    def _one(self, tokens: dict[str, Tensor], device: torch.device) -> Conditioning:
        tokens = trimmed(tokens, self._ragged, axis=1)  # the batch's padding is not the caption's
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
