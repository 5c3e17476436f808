"""One folder per model family; ``base.Architecture`` says what a family declares."""

from library.lazy_imports import defer_import

# diffusers imports it with every model, for quantised ones; here only the 8-bit optimizers use it
defer_import("bitsandbytes")
