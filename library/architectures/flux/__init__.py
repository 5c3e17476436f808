"""FLUX.1 (dev and schnell) and Chroma."""

from library.lazy_imports import found_in

__getattr__ = found_in("library.architectures.flux.family", "FLUX", "FLUX_FOR_CONTROLNETS", "Flux")
