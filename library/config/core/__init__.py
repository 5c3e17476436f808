"""The options that all training scripts share, by topic, with their rules."""

from __future__ import annotations

from library.config.attention import ATTENTION
from library.config.core import data, diffusion, model, optimizer, output, program, training, watching
from library.config.declaration import joined

#: in the order of ``--help``
CORE = joined(
    *(topic.DECLARATION for topic in (model, data, output, training, optimizer, diffusion, watching, program)),
    ATTENTION,
)
