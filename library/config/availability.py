"""DeepSpeed options that are refused, and why: they would otherwise be ignored without a message."""

from __future__ import annotations

from types import MappingProxyType

_ZERO_3 = (
    "only ZeRO stage 3 has it, whose engine would own the forward pass, clipping and states; choose FSDP version 2 in "
    "accelerate config, which shards the same (docs/multi_gpu.md)"
)

NO_STAGE_3 = (
    "DeepSpeed's engine would own the forward pass, clipping and states, which are this program's; choose FSDP version "
    "2 in accelerate config, which shards the same: weights, gradients and the optimizer's states (docs/multi_gpu.md)"
)
NO_NVME = "DeepSpeed keeps states on a disk with ZeRO stage 3 only, which is refused; use cpu, or leave it out"

#: option -> why DeepSpeed excludes it
NOT_WITH_DEEPSPEED = MappingProxyType(
    {
        "full_bf16": "not with DeepSpeed, which keeps trained weights in float32; remove one of them",
        "full_fp16": "not with DeepSpeed, which keeps trained weights in float32; remove one of them",
        "fused_backward_pass": "not with DeepSpeed, which updates all weights at once; remove one of them",
    }
)

#: options of ZeRO stage 3: option -> why it is refused, and what to use
OF_STAGE_3 = MappingProxyType(
    {
        "offload_optimizer_nvme_path": _ZERO_3,
        "offload_param_device": _ZERO_3,
        "offload_param_nvme_path": _ZERO_3,
        "zero3_init_flag": _ZERO_3,
        "zero3_save_16bit_model": _ZERO_3,
        "fp16_master_weights_and_gradients": (
            "it is for weights that DeepSpeed casts to fp16 by itself; trained weights stay float32 here, as in every "
            "run; remove it"
        ),
    }
)
