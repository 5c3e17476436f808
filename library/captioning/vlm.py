"""Vision-language models of transformers' image-text-to-text classes: LLaVA, Qwen-VL, Florence-2 and others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from library.captioning.describing import Loaded
from library.captioning.hub_models import device_for, load_pretrained, model_folder, seed_batch
from library.captioning.prompts import Prompt
from library.errors import UserError


@dataclass(frozen=True)
class Answer:
    """The settings of generating an answer; ``temperature`` 0 takes the likeliest word at every step."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def arguments(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


class VisionLanguageModel:
    """A model with its processor.

    Args:
        precision: float, fp16, bf16, or auto: bf16 on a GPU, float on a CPU.
        system: what the conversation begins with, for models that have conversations.
    """

    def __init__(
        self, model_id: str, prompt: Prompt, answer: Answer, *, system: str | None, precision: str, device: str | None
    ) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from library.memory.placing import move

        flag = "--model_id"
        folder = model_folder(model_id, flag)
        self._processor = _processor_of(folder, flag)
        tokenizer = getattr(self._processor, "tokenizer", None)
        if tokenizer is None or getattr(self._processor, "image_processor", None) is None:
            raise UserError(f"{flag} {model_id}: has no processor of images and text; it is no vision-language model")
        tokenizer.padding_side = "left"  # so that answers follow their prompts
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if system is not None and not self._converses:
            raise UserError(f"--system_prompt: {model_id} has no conversations; put it into the prompt")
        self._device = device_for(device)
        if precision == "auto":
            precision = "float" if self._device.type == "cpu" else "bf16"
        self._dtype = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        model = load_pretrained(AutoModelForImageTextToText, folder, flag, dtype=self._dtype)
        self._model = move(model.eval(), self._device)
        self._prompt, self._answer, self._system = prompt, answer, system

    @property
    def _converses(self) -> bool:
        return getattr(self._processor, "chat_template", None) is not None

    def prepare(self, pixels: np.ndarray) -> Any:
        from PIL import Image

        return Image.fromarray(pixels)

    def describe(self, images: Sequence[Loaded[Any]]) -> Sequence[str]:
        import torch

        texts = [self._text(self._prompt.of(image.path)) for image in images]
        # one list for each text, which processors of conversations ask for; those of one image a text take them flat
        prepared: Any = [[image.prepared] for image in images] if self._converses else [i.prepared for i in images]
        try:
            inputs = self._processor(images=prepared, text=texts, return_tensors="pt", padding=True)
        except ValueError as error:  # such as of a prompt without the model's word for an image
            reason = str(error).splitlines()[0][:300]
            raise UserError(f"--prompt: the model's processor refuses it ({reason})") from None
        inputs = inputs.to(self._device, self._dtype)
        seed_batch(self._answer.seed, [image.path.name for image in images])
        with torch.inference_mode():
            made = self._model.generate(**inputs, **self._answer.arguments())
        if not self._model.config.is_encoder_decoder:
            made = made[:, inputs["input_ids"].shape[1] :]  # the answers alone
        return [one_line(text) for text in self._processor.batch_decode(made, skip_special_tokens=True)]

    def _text(self, prompt: str) -> str:
        if not self._converses:
            return prompt
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system}]})
        return self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _processor_of(folder: Path, flag: str) -> Any:
    """Load the processor of a model. That of models which see videos too is one of images alone without torchvision,
    which only videos need.

    Raises:
        UserError: there is none that transformers can load.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return load_pretrained(AutoProcessor, folder, flag)
    config = type(load_pretrained(AutoConfig, folder, flag))
    kind: Any = PROCESSOR_MAPPING[config] if config in PROCESSOR_MAPPING else AutoProcessor
    if "video_processor" not in getattr(kind, "get_attributes", list)():
        return load_pretrained(AutoProcessor, folder, flag)

    def attributes(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    of_images = type(kind.__name__, (kind,), {"get_attributes": classmethod(attributes)})
    return load_pretrained(of_images, folder, flag)


def one_line(text: str) -> str:
    """Return an answer as one line: training takes each line of a caption file for a caption of its own."""
    return re.sub(r"\s+", " ", text).strip()
