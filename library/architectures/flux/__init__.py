"""FLUX.1 and Chroma."""
