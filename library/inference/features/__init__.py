"""Features of generation besides plain sampling: one file each, combined by ``library.inference.denoise``."""
