"""The options that every training script has, by topic, with their rules."""

from __future__ import annotations

from library.config.core import data, diffusion, model, network, optimizer, output, program, training, watching
from library.config.declaration import joined

#: of all scripts, in the order of ``--help``
CORE = joined(
    *(topic.DECLARATION for topic in (model, data, network, output, training, optimizer, diffusion, watching, program))
)
