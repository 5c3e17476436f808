"""Stable Diffusion XL."""

from library.lazy_imports import found_in

__getattr__ = found_in("library.architectures.sdxl.family", "SDXL", "StableDiffusionXL")
