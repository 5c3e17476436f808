"""What may be done to a generation besides plain sampling: one file each, joined by ``library.inference.denoise``."""
