"""What accelerate's configuration may ask for. ``accelerate launch`` hands it to every process in the environment."""

from __future__ import annotations

import logging
import os
from types import MappingProxyType

from library.errors import UserError

logger = logging.getLogger(__name__)

_INSIDE = "adapters act inside the frozen model's own modules, which it would split or wrap"
_INSTEAD = "use accelerate launch --multi_gpu, or an accelerate configuration without it; see docs/multi_gpu.md"

#: variable -> what it stands for and why it cannot be had
UNSUPPORTED = MappingProxyType(
    {
        "ACCELERATE_USE_FSDP": ("FSDP", _INSIDE),
        "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", _INSIDE),
        "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it has models of its own"),
        "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism_config", _INSIDE),
    }
)


def check_launch(mixed_precision: str) -> None:
    """Refuse what this run cannot do, and say what it decides by itself.

    Args:
        mixed_precision: the run's, which wins over accelerate's.

    Raises:
        UserError: one line for each thing that would otherwise be silently left out.
    """
    problems = [
        f"accelerate's configuration asks for {name}: {why}; {_INSTEAD}"
        for variable, (name, why) in UNSUPPORTED.items()
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
    ]
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        problems.append(
            f"accelerate's configuration asks for the compiler {compiler}: it would compile the adapters, which are "
            "never called by themselves; remove dynamo_config from it, and give --torch_compile"
        )
    if problems:
        raise UserError("\n".join(problems))
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if theirs not in ("no", mixed_precision):
        logger.warning(
            "accelerate's mixed precision %s is not used, as --mixed_precision %s decides; give --mixed_precision %s",
            *(theirs, mixed_precision, theirs),
        )
