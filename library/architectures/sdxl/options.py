"""The options of all scripts that Stable Diffusion XL refuses, ignores or words in its own way; and those of its prompts."""

from __future__ import annotations

from library.config import prompt_options as read
from library.config.declaration import Declaration
from library.config.prompt_options import PromptOption

DECLARATION = Declaration(
    refused={"v2": "that is for Stable Diffusion 2.x, whose script is train_network.py; remove it"},
    unused={"clip_skip": "as SDXL always uses the last but one layer of both text encoders"},
)
#: what the second text encoder reads, or the empty text for the prompt; only the minimal inference script has it
SECOND_PROMPT = PromptOption("p", "prompt2", read.text_or_dash, "prompt2")
