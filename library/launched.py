"""Read what launchers (accelerate launch, torchrun) put into a process's environment."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this is the main process."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


#: set by ``accelerate launch``
USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


def is_on(variable: str) -> bool:
    """Whether a launcher's switch is set."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
