"""DeepSpeed options that are refused, and why: they would otherwise be ignored without a message."""

from __future__ import annotations

from types import MappingProxyType

NO_NVME = "weights and states are kept in device or host memory, not on disks; use cpu, or leave it out"

#: option -> why DeepSpeed, which stages 0 to 2 run in, excludes it
NOT_WITH_DEEPSPEED = MappingProxyType(
    {
        "full_bf16": "not with DeepSpeed, which keeps trained weights in float32; remove one of them",
        "full_fp16": "not with DeepSpeed, which keeps trained weights in float32; remove one of them",
        "fused_backward_pass": "not with DeepSpeed, which updates all weights at once; remove one of them",
    }
)

#: option -> why it is refused, and what to use
OF_DEEPSPEED = MappingProxyType(
    {
        "offload_optimizer_nvme_path": NO_NVME,
        "offload_param_nvme_path": NO_NVME,
        "fp16_master_weights_and_gradients": (
            "it is for weights that DeepSpeed casts to fp16 by itself; trained weights stay float32 here, as in every "
            "run; remove it"
        ),
    }
)
