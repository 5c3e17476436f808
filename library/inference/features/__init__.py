"""What may be done to a generation beside plain sampling; one file for each, joined by ``library.inference.denoise``."""
