"""The models of a drawing, loaded when they are first used."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Parts:
    """Text encoders, denoiser and so on, by name.

    Args:
        loaders: load a part onto the device. Nothing else may hold on to what they return.
        one_at_a_time: free the part that is there before another one is loaded. It is read from its files again when
            it is needed again, which the system keeps in its cache as far as memory allows; so no copy has to be kept.
        device: that the loaders use.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]], *, one_at_a_time: bool, device: torch.device) -> None:
        self._loaders = loaders
        self._one_at_a_time = one_at_a_time
        self._device = device
        self._loaded: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """The part, loaded if it is not there. What was got before must not be used any more, one at a time."""
        if name not in self._loaded:
            if self._one_at_a_time:
                self.free()
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]

    @property
    def loaded(self) -> list[Any]:
        return list(self._loaded.values())

    def free(self) -> None:
        """Give the memory of all parts back."""
        if not self._loaded:
            return
        logger.debug("freed: %s", ", ".join(self._loaded))
        self._loaded.clear()
        gc.collect()  # adapters and the modules that they hook into refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
