"""One folder per model family; ``base.Architecture`` is the interface that a family implements."""

from library.lazy_imports import defer_import, hide_from

# diffusers imports it with every model, for quantized models; here only the 8-bit optimizers use it
defer_import("bitsandbytes")
# diffusers imports it with every model too, which takes seconds and prints warnings, for files that are not read here
hide_from("diffusers.utils.import_utils", "torchao")
