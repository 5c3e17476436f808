"""HunyuanImage-2.1."""

from library.lazy_imports import found_in

__getattr__ = found_in("library.architectures.hunyuan_image.family", "HUNYUAN_IMAGE", "HunyuanImage21")
