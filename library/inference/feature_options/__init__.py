"""Options of ``gen_img.py`` for one feature of generation each, with their rules; without torch."""
