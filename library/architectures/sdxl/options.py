"""The options of all scripts that Stable Diffusion XL refuses, ignores or words in its own way."""

from __future__ import annotations

from library.config.declaration import Declaration

DECLARATION = Declaration(
    refused={"v2": "that is for Stable Diffusion 2.x, whose script is train_network.py; remove it"},
    unused={"clip_skip": "as SDXL always uses the last but one layer of both text encoders"},
)
