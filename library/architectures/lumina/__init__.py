"""Lumina-Image 2.0: the transformer, its sizes and its names; the family itself is still to come."""
