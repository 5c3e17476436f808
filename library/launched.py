"""Read what launchers (accelerate launch, torchrun) put into a process's environment."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path


def is_first_process() -> bool:
    """Whether this is the main process."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


#: set by ``accelerate launch``
USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
#: the ZeRO stage that shards weights, too
WEIGHTS = 3


def is_on(variable: str) -> bool:
    """Whether a launcher's switch is set."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def zero_stage() -> int | None:
    """Return the ZeRO stage of accelerate's configuration, without its checks; ``None`` without DeepSpeed."""
    if not is_on(USE_DEEPSPEED):
        return None
    stage: object = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    try:
        if (file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
            # accelerate takes the content in base64, too
            text = Path(file).read_bytes() if os.path.exists(file) else base64.urlsafe_b64decode(file)
            stage = json.loads(text)["zero_optimization"].get("stage", 0)
        return int(str(stage))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 2  # accelerate names the error
