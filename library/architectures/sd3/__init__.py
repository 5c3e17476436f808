"""Stable Diffusion 3 and 3.5."""

from library.lazy_imports import found_in

__getattr__ = found_in("library.architectures.sd3.family", "SD3", "StableDiffusion3")
