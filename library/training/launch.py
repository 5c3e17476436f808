"""Check accelerate's configuration, which ``accelerate launch`` passes to every process in the environment."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from types import MappingProxyType

from library.config.arguments import TrainingOptions
from library.errors import UserError
from library.launched import USE_DEEPSPEED, is_on
from library.memory.sharding import Sharding
from library.training.zero import asked_weights, problems_of_deepspeed

logger = logging.getLogger(__name__)

_INSTEAD = "use accelerate launch --multi_gpu, or an accelerate configuration without it; see docs/multi_gpu.md"
_USE_FSDP = "ACCELERATE_USE_FSDP"

#: variable -> its name, why it is refused, and what to do
UNSUPPORTED = MappingProxyType(
    {
        "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", f"it has models of its own; {_INSTEAD}"),
        "ACCELERATE_USE_PARALLELISM_CONFIG": (
            "a parallelism_config",
            f"models are sharded over all processes or none; {_INSTEAD}",
        ),
    }
)

#: switches of FSDP that have an option in this program, or no meaning: variable -> setting and what to do
_UNSUPPORTED_SWITCHES = MappingProxyType(
    {
        "FSDP_ACTIVATION_CHECKPOINTING": (
            "fsdp_activation_checkpointing",
            "set it to false, give --gradient_checkpointing",
        ),
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (
            "fsdp_activation_checkpointing_offload",
            "set it to false, give --gradient_checkpointing --cpu_offload_checkpointing",
        ),
        "FSDP_FORWARD_PREFETCH": ("fsdp_forward_prefetch", "version 2 of FSDP does not have it; remove it"),
    }
)

#: wrapping policies that are refused, with the reason
_UNSUPPORTED_POLICIES = MappingProxyType(
    {
        "SIZE_BASED_WRAP": "it may wrap modules that are never called, whose weights would stay sharded",
        "NO_WRAP": "the whole model would be gathered for each step",
    }
)


def check_launch(options: TrainingOptions) -> None:
    """Refuse settings that this run cannot use, and warn of settings that its options decide.

    Raises:
        UserError: one line for each setting that would otherwise be ignored without a message.
    """
    problems = [
        f"accelerate's configuration asks for {name}: {why}"
        for variable, (name, why) in UNSUPPORTED.items()
        if is_on(variable)
    ]
    if is_on(_USE_FSDP):
        problems += _problems_of_fsdp() + _problems_of_sharding(options, "FSDP")
    problems += problems_of_deepspeed(options, with_fsdp=is_on(_USE_FSDP))
    if not problems and (zero := asked_weights(options)) is not None:
        problems += _problems_of_sharding(options, zero.asked_as)
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        problems.append(
            f"accelerate's configuration asks for the compiler {compiler}: it would compile the adapters, which are "
            "never called by themselves; remove dynamo_config from it, and give --torch_compile"
        )
    if problems:
        raise UserError("\n".join(problems))
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if theirs not in ("no", options.mixed_precision):
        logger.warning(
            "accelerate's mixed precision %s is not used, as --mixed_precision %s decides; give --mixed_precision %s",
            *(theirs, options.mixed_precision, theirs),
        )


def _problems_of_fsdp() -> list[str]:
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        return [
            f"accelerate's configuration asks for FSDP version {version}: it would replace the parameters that "
            "adapters look for; choose version 2 in accelerate config (fsdp_version: 2); see docs/multi_gpu.md"
        ]
    problems = [
        f"accelerate's configuration asks for {name}: {instead}"
        for variable, (name, instead) in _UNSUPPORTED_SWITCHES.items()
        if is_on(variable)
    ]
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    if policy in _UNSUPPORTED_POLICIES:
        problems.append(
            f"accelerate's configuration asks for fsdp_auto_wrap_policy {policy}: {_UNSUPPORTED_POLICIES[policy]}; "
            "choose TRANSFORMER_BASED_WRAP"
        )
    return problems


def _problems_of_sharding(options: TrainingOptions, asked: str) -> list[str]:
    """Return one line for each option that excludes sharded weights."""
    problems = []
    for name in ("fp8_base", "fp8_base_unet", "fp8_scaled", "quantize_base"):
        if getattr(options, name):
            problems.append(
                f"--{name}: not with {asked}, as weights in small forms cannot be sharded; remove one of them"
            )
    if options.memory_plan is not None:
        problems.append(f"--memory_plan: not with {asked}, as it counts whole weights; remove one of them")
    if options.torch_compile or options.compile:
        flag = "--compile" if options.compile else "--torch_compile"
        problems.append(f"{flag}: not with {asked}, which works between the blocks; remove one of them")
    return problems


def asked_sharding(options: TrainingOptions) -> Sharding | None:
    """Return the sharding of weights that options and configuration ask for; ``check_launch`` has passed them.

    Raises:
        UserError: accelerate cannot read its own configuration.
    """
    if not is_on(_USE_FSDP):
        return asked_weights(options)
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, KeyError) as error:
        raise UserError(f"accelerate's configuration of FSDP: {error}; run accelerate config again") from None
    classes = plugin.transformer_cls_names_to_wrap or []
    return Sharding(
        free_after_forward=plugin.reshard_after_forward,
        on_host=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        classes=tuple(name.strip() for name in classes if name.strip()),
        kept_whole=plugin.ignored_modules,
    )


@contextlib.contextmanager
def without_their_sharding() -> Iterator[None]:
    """Let accelerate's object be made as for plain data parallelism, by which trained weights are handled and saved."""
    given = {name: os.environ[name] for name in (_USE_FSDP, USE_DEEPSPEED) if name in os.environ}
    os.environ.update(dict.fromkeys(given, "false"))
    try:
        yield
    finally:
        os.environ.update(given)
