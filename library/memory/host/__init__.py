"""Computing on the CPU: kernels that train faster there than torch's, behind one call.

They change no result beyond rounding, and step aside wherever torch's own are quicker. tools/environment.sh has the
settings of the C library.
"""

from __future__ import annotations

from torch import nn


def use_host_kernels(denoiser: nn.Module, *, convolutions: bool = True) -> None:
    """Let a denoiser on the CPU attend and convolve in the quicker way.

    Args:
        convolutions: whether its weights lie with channels last, as the quicker convolutions need.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    from library.memory.host.attention import HostAttention
    from library.memory.host.convolution import convolve_as_products

    processors = getattr(denoiser, "attn_processors", {})
    if processors and all(type(processor) is AttnProcessor2_0 for processor in processors.values()):
        denoiser.set_attn_processor(HostAttention(AttnProcessor2_0()))
    if convolutions:
        convolve_as_products(denoiser)
