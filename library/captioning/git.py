"""GIT (Wang et al. 2022), as transformers' GitForCausalLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from library.captioning.describing import Loaded
from library.captioning.hub_models import device_for, load_pretrained, model_folder
from library.captioning.written_words import without_written_words


class Git:
    """The model with its processor; the likeliest word at every step.

    Args:
        max_length: tokens of a caption at most.
        remove_words: take out what captions say of words in the image.
    """

    def __init__(self, model_id: str, max_length: int, *, remove_words: bool, device: str | None) -> None:
        from transformers import AutoModelForCausalLM, AutoProcessor

        from library.memory.placing import move

        folder = model_folder(model_id, "--model_id")
        self._processor = load_pretrained(AutoProcessor, folder, "--model_id")
        self._device = device_for(device)
        self._model = move(load_pretrained(AutoModelForCausalLM, folder, "--model_id").eval(), self._device)
        self._max_length = max_length
        self._remove_words = remove_words

    def prepare(self, pixels: np.ndarray) -> Any:
        return self._processor.image_processor(pixels, return_tensors="pt")["pixel_values"]

    def describe(self, images: Sequence[Loaded[Any]]) -> Sequence[str]:
        import torch

        pixels = torch.cat([image.prepared for image in images]).to(self._device)  # (B, 3, H, W)
        with torch.inference_mode():
            made = self._model.generate(pixel_values=pixels, max_length=self._max_length, do_sample=False)
        texts = [text.strip() for text in self._processor.batch_decode(made, skip_special_tokens=True)]
        return [without_written_words(text) for text in texts] if self._remove_words else texts
