"""The facts about a model that are known before its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a checkpoint that its keys, shapes or configuration give."""

    family: str
    version: str  # as recorded in ss_base_model_version, e.g. "sd_v1", "sd_v2_v"
    description: str  # for people: "Stable Diffusion 1.x, epsilon prediction"
    v_prediction: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # family's own (configs, sizes)


@dataclass(frozen=True)
class WeightsIdentity:
    """Identifies the weights that something was made with. Either text is enough; the first is cheap."""

    files: str  # equal: the files have not changed
    read: Callable[[], str]  # equal: the weights are the same, wherever they are; reads all of them

    @cached_property
    def weights(self) -> str:
        return self.read()
