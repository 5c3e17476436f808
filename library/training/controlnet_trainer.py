"""The published classes of training ControlNets, which entry scripts and wrappers subclass."""

from __future__ import annotations

from library.training.kinds.controlnet import ControlNet, ControlNetForTransformers, ControlNetWithRate
from library.training.trainer import Trainer


class ControlNetTrainer(Trainer):
    """Train a ControlNet."""

    kind = ControlNet


class ControlNetWithRateTrainer(Trainer):
    """Train a ControlNet whose own layers have a learning rate of their own."""

    kind = ControlNetWithRate


class ControlNetForTransformersTrainer(Trainer):
    """Train a ControlNet of a transformer."""

    kind = ControlNetForTransformers
