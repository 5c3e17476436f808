"""Check and read DeepSpeed's settings, from options or from accelerate's configuration.

ZeRO stages 0 to 2 are DeepSpeed's own: it shards the optimizer. Stage 3 shards the weights, too, as FSDP does
(Rajbhandari et al. 2020, arXiv:1910.02054, 5.3), and torch's FSDP does it here: DeepSpeed's own would have to own the
forward pass, clipping and states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from library.config.arguments import RunOptions, TrainingOptions
from library.config.availability import NO_NVME
from library.errors import NoEffect, UserError
from library.launched import USE_DEEPSPEED, WEIGHTS, is_on
from library.memory.sharding import Sharding
from library.optim.optimizers import OptimizerChoice
from library.optim.zero import Zero, ZeroOptimizer, check_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


#: settings of ``zero_optimization`` that are passed to DeepSpeed
_HANDED_ON = (
    "allgather_partitions", "allgather_bucket_size", "contiguous_gradients", "overlap_comm", "reduce_bucket_size",
    "reduce_scatter",
)  # fmt: skip

#: settings of a DeepSpeed file that this program's options decide, or that it sets by itself
_DECIDED = (
    "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print", "train_batch_size",
    "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip


def problems_of_deepspeed(options: TrainingOptions, *, with_fsdp: bool) -> list[str]:
    """Return one line for each refused setting; none without DeepSpeed.

    Raises:
        UserError: accelerate cannot read its own configuration.
    """
    if not (options.deepspeed or is_on(USE_DEEPSPEED)):
        return []
    if find_spec("deepspeed") is None and (is_on(USE_DEEPSPEED) or options.zero_stage < WEIGHTS):
        return ["DeepSpeed is asked for, and the package deepspeed is not installed; run: pip install deepspeed"]
    problems = []
    if with_fsdp:
        problems.append("--deepspeed: not with FSDP, which accelerate's configuration asks for; remove one of them")
    if not is_on(USE_DEEPSPEED):
        return problems
    config = _configuration()
    problems += _problems_of_file(config)
    if problems or not options.deepspeed:
        return problems
    if (_zero_of(config), _weights_of(config)) != (_zero_of_options(options), _weights_of_options(options)):
        problems.append(
            "--deepspeed: its options and accelerate's configuration ask DeepSpeed for different things; remove "
            "--deepspeed, or make them agree"
        )
    return problems


def asked_zero(options: TrainingOptions) -> Zero | None:
    """Return the sharding of the optimizer; ``problems_of_deepspeed`` has passed it. ``None`` without, and in stage 3."""
    if is_on(USE_DEEPSPEED):
        return _zero_of(_configuration())
    return _zero_of_options(options) if options.deepspeed else None


def asked_weights(options: TrainingOptions) -> Sharding | None:
    """Return the sharding of weights in stage 3; ``problems_of_deepspeed`` has passed it."""
    if is_on(USE_DEEPSPEED):
        return _weights_of(_configuration())
    return _weights_of_options(options) if options.deepspeed else None


def _zero_of_options(options: TrainingOptions) -> Zero | None:
    if options.zero_stage == WEIGHTS:
        return None
    return Zero(options.zero_stage, on_host=options.offload_optimizer_device == "cpu" and options.zero_stage > 0)


def _weights_of_options(options: TrainingOptions) -> Sharding | None:
    if options.zero_stage != WEIGHTS:
        return None
    return _stage_3(on_host="cpu" in (options.offload_optimizer_device, options.offload_param_device))


def _stage_3(*, on_host: bool) -> Sharding:
    # the optimizer's states are where the shards are, so either stands for both
    return Sharding(on_host=on_host, asked_as="ZeRO stage 3")


def _configuration() -> dict[str, Any]:
    """Return DeepSpeed's configuration from accelerate, from its own questions or from a DeepSpeed file."""
    from accelerate import DeepSpeedPlugin

    try:
        plugin = DeepSpeedPlugin()
    except (ValueError, KeyError, OSError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"accelerate's configuration of DeepSpeed: {what}; run accelerate config again") from None
    return plugin.deepspeed_config


def _device(config: Mapping[str, Any], name: str) -> str:
    return (config["zero_optimization"].get(name) or {}).get("device") or "none"


def _weights_of(config: Mapping[str, Any]) -> Sharding | None:
    if int(config["zero_optimization"].get("stage", 0)) != WEIGHTS:
        return None
    return _stage_3(on_host="cpu" in (_device(config, "offload_optimizer"), _device(config, "offload_param")))


def _zero_of(config: Mapping[str, Any]) -> Zero | None:
    asked = config["zero_optimization"]
    stage = int(asked.get("stage", 0))
    if stage == WEIGHTS:
        return None
    settings = {name: asked[name] for name in _HANDED_ON if asked.get(name, "auto") != "auto"}
    on_host = stage > 0 and _device(config, "offload_optimizer") == "cpu"
    if on_host:
        offload = {n: v for n, v in asked["offload_optimizer"].items() if n not in ("device", "nvme_path")}
        settings |= {"offload_optimizer": {"device": "cpu", **offload}} if offload else {}
    return Zero(stage, on_host=on_host, settings=settings)


def _problems_of_file(config: Mapping[str, Any]) -> list[str]:
    asked = config["zero_optimization"]
    start = "accelerate's configuration asks for DeepSpeed's"
    shards_weights = _weights_of(config) is not None
    problems = [
        f"{start} {name} to nvme: {NO_NVME}"
        for name in ("offload_optimizer", "offload_param")
        if _device(config, name) == "nvme"
    ]
    if _device(config, "offload_optimizer") != "none" and not asked.get("stage"):
        problems.append(f"{start} offload_optimizer with ZeRO stage 0, which shards nothing; set it to none")
    if _device(config, "offload_param") == "cpu" and not shards_weights:
        problems.append(f"{start} offload_param: only ZeRO stage 3 has it; set it to none")
    known = {"stage", "offload_optimizer", "offload_param", *_HANDED_ON}
    if shards_weights:
        known.add("sub_group_size")  # of an update in parts; torch's is of one parameter at a time
    others = [
        f"zero_optimization.{n}" for n, v in asked.items() if n not in known and not n.startswith("stage3_") and v
    ]
    others += [name for name in config if name not in {"zero_optimization", *_DECIDED}]
    return problems + [f"{start} {name}: options of this program decide that, or it does not have it; remove it"
                       for name in others]  # fmt: skip


def check_zero(options: RunOptions, optimizer: OptimizerChoice, accelerator: Accelerator) -> list[str]:
    """Check before anything is loaded; returns warnings.

    Raises:
        UserError: an optimizer that does not work on parts of weights.
    """
    zero = asked_zero(options.training)
    if zero is None:
        return _differences(options)  # of stage 3, if any
    check_optimizer(optimizer.create([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]))
    found = _differences(options)
    if accelerator.num_processes == 1 and not zero.on_host:
        found.append(NoEffect("DeepSpeed has no effect with one process: there is nothing to shard"))
    if zero.on_host and accelerator.device.type == "cpu":
        found.append(NoEffect("DeepSpeed: offloading has no effect on a CPU, where states are in host memory anyway"))
    return found


def _differences(options: RunOptions) -> list[str]:
    """Yield differences between accelerate's configuration and the options, which win."""
    if not is_on(USE_DEEPSPEED):
        return []
    config, found = _configuration(), []
    steps, norm = options.training.gradient_accumulation_steps, options.optimizer.max_grad_norm
    for name, flag, ours in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps", steps),
        ("gradient_clipping", "max_grad_norm", norm),
    ):
        if (theirs := config.get(name, "auto")) not in ("auto", ours):
            found.append(
                f"accelerate's {name} {theirs} is not used, as --{flag} {ours:g} decides; give --{flag} {theirs}"
            )
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if (theirs := config.get(name, "auto")) != "auto":
            found.append(f"accelerate's {name} {theirs} is not used, as the dataset's batch_size decides")
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") is True and (precision := options.training.mixed_precision) != name:
            found.append(f"DeepSpeed's {name} is not used, as --mixed_precision {precision} decides")
    return found


def zero_of(options: TrainingOptions, accelerator: Accelerator) -> Zero | None:
    """Return the sharding of this run; ``None`` if there is nothing to shard."""
    zero = asked_zero(options)
    return None if zero is None or (accelerator.num_processes == 1 and not zero.on_host) else zero


def zero_rows(
    optimizer: torch.optim.Optimizer | None, parameters: Sequence[torch.nn.Parameter], options: TrainingOptions
) -> list[tuple[str, str]]:
    """Return rows for the table before the first step; a dry run has no optimizer."""
    if not isinstance(optimizer, ZeroOptimizer):
        return []
    zero = asked_zero(options)
    assert zero is not None, "the optimizer is sharded"
    total = sum(p.numel() for p in parameters)
    where = "host memory" if zero.on_host else "device memory"
    states = f"states of {min(optimizer.numbers_here, total):,} of {total:,} trained numbers in each process's {where}"
    return [("DeepSpeed", f"ZeRO stage {zero.stage}, {states}")]
