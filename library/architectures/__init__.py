"""One folder per model family; ``base.Architecture`` is the interface that a family implements."""

from library.lazy_imports import defer_import

# diffusers imports it with every model, for quantized models; here only the 8-bit optimizers use it
defer_import("bitsandbytes")
