"""Stable Diffusion 1.x and 2.x have no options of their own: those of all scripts were made for them."""

from __future__ import annotations

from library.config.declaration import Declaration

DECLARATION = Declaration()
