"""Models for generating, loaded on first use."""

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
        loaders: load a part onto the device. Nothing else may keep a reference to the result.
        one_at_a_time: free the loaded part before another one is loaded. It is read again when it is needed; the
            system's file cache keeps its files as far as memory allows, so no copy is kept.
        device: that the loaders use.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]], *, one_at_a_time: bool, device: torch.device) -> None:
        self._loaders = loaders
        self._one_at_a_time = one_at_a_time
        self._device = device
        self._loaded: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """Return the part, loaded if necessary. With one at a time, earlier parts must not be used any more."""
        if name not in self._loaded:
            if self._one_at_a_time:
                self.free()
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]

    @property
    def loaded(self) -> list[Any]:
        return list(self._loaded.values())

    def free(self) -> None:
        """Free the memory of all parts."""
        if not self._loaded:
            return
        logger.debug("freed: %s", ", ".join(self._loaded))
        self._loaded.clear()
        gc.collect()  # adapters and their modules refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
