"""Stable Diffusion 1.x and 2.x."""

from library.lazy_imports import found_in

__getattr__ = found_in("library.architectures.sd.family", "SD", "StableDiffusion")
