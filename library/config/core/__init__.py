"""The options that training scripts share, by topic, with their rules."""

from __future__ import annotations

from collections.abc import Collection

from library.config.core import data, diffusion, model, network, optimizer, output, program, training, watching
from library.config.declaration import Declaration, joined

#: in the order of ``--help``
_TOPICS = tuple(
    topic.DECLARATION for topic in (model, data, network, output, training, optimizer, diffusion, watching, program)
)
CORE = joined(*_TOPICS)


def core_of(groups: Collection[str]) -> Declaration:
    """What the core says of options with these groups; a topic that a script does not have says nothing."""
    return joined(*(topic for topic in _TOPICS if set(topic.groups) <= set(groups)))
