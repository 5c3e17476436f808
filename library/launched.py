"""What launchers (accelerate launch, torchrun) tell a process in its environment, before the processes join."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this is the main process."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
