"""Adapter files under other programs' names: ``networks/convert_lora.py`` and ``networks/convert_flux_lora.py``."""
