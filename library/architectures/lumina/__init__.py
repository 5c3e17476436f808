"""Lumina-Image 2.0."""

from library.lazy_imports import found_in

__getattr__ = found_in("library.architectures.lumina.family", "LUMINA", "LuminaImage2")
