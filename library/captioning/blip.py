"""BLIP (Li et al. 2022), as transformers' BlipForConditionalGeneration; its original weights are read too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from library.captioning.describing import Loaded
from library.captioning.hub_models import device_for, load_pretrained, model_folder, seed_batch
from library.errors import UserError

#: the published file of original weights, and the same network on the Hub
PUBLISHED_FILE = "model_large_caption.pth"
LARGE = "Salesforce/blip-image-captioning-large"

PROMPT = "a picture of "


@dataclass(frozen=True)
class Search:
    """The settings of generating text: beams, or (``beams`` 0) sampling among the likeliest words, up to ``top_p``.

    Lengths are tokens, the prompt's included.
    """

    beams: int
    top_p: float
    max_length: int
    min_length: int
    seed: int

    def arguments(self) -> dict[str, Any]:
        lengths = {"max_length": self.max_length, "min_length": self.min_length}
        if self.beams:
            return {**lengths, "num_beams": self.beams, "do_sample": False, "repetition_penalty": 1.0}
        return {**lengths, "do_sample": True, "top_p": self.top_p, "top_k": 0, "repetition_penalty": 1.1}


class Blip:
    """The model with its processor.

    Args:
        weights: a folder or Hub id of transformers' form, a file of the original form, or the published address, for
            which the Hub's copy of the same network is taken.
    """

    def __init__(self, weights: str, search: Search, device: str | None) -> None:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        from library.memory.placing import move

        flag = "--caption_weights"
        if weights.startswith(("http://", "https://")):
            if weights.rpartition("/")[2] != PUBLISHED_FILE:
                raise UserError(f"{flag} {weights}: addresses are not read; name a file, a folder or an id on the Hub")
            weights = LARGE
        self._device = device_for(device)
        original = None
        if Path(weights).is_file():
            original = _read_original(Path(weights))
            folder = Path(weights).parent
            with_tokenizer = folder if (folder / "tokenizer_config.json").exists() else model_folder(LARGE, flag)
        else:
            with_tokenizer = model_folder(weights, flag)
        self._processor = load_pretrained(BlipProcessor, with_tokenizer, flag)
        if original is None:
            self._model = load_pretrained(BlipForConditionalGeneration, with_tokenizer, flag)
        else:
            self._model = _original(Path(weights), original, end_token=self._processor.tokenizer.sep_token_id)
        move(self._model.eval(), self._device)
        self._search = search

    def prepare(self, pixels: np.ndarray) -> Any:
        return self._processor.image_processor(pixels, return_tensors="pt")["pixel_values"]

    def describe(self, images: Sequence[Loaded[Any]]) -> Sequence[str]:
        import torch

        tokens = self._processor.tokenizer([PROMPT] * len(images), return_tensors="pt").to(self._device)
        pixels = torch.cat([image.prepared for image in images]).to(self._device)  # (B, 3, H, W)
        seed_batch(self._search.seed, [image.path.name for image in images])
        with torch.inference_mode():
            made = self._model.generate(
                pixel_values=pixels,
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                **self._search.arguments(),
            )
        made = made[:, tokens["input_ids"].shape[1] - 1 :]  # less the prompt, whose last token is not used
        return [text.strip() for text in self._processor.batch_decode(made, skip_special_tokens=True)]


# ---- the original form ----

#: two weights that every BLIP of captions has
_PATCH = "vision_model.embeddings.patch_embedding.weight"
_WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"

#: parts of original names -> transformers', applied in this order to names of the image's encoder
_VISION = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return original weights under transformers' names; those of the text's decoder are the same."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("visual_encoder."):
            for pattern, new in _VISION:
                name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def _read_original(path: Path) -> dict[str, Any]:
    """Return the weights of a file of the original form, under transformers' names.

    Raises:
        UserError: something else is in the file.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, by what is wrong with the file
        raise UserError(f"--caption_weights {path}: cannot be read ({str(error).splitlines()[0][:200]})") from None
    state = renamed(content.get("model", content) if isinstance(content, Mapping) else {})
    if _PATCH not in state or _WORDS not in state:
        raise UserError(f"--caption_weights {path}: holds no BLIP that writes captions")
    return state


def _original(path: Path, state: Mapping[str, Any], *, end_token: int) -> Any:
    """Return the model of original weights; their sizes tell which of the published networks it is.

    Args:
        end_token: of the tokenizer; the two tokens that BLIP adds to it, which begin texts, are the last ones.

    Raises:
        UserError: a weight is missing.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration

    patch, words = state[_PATCH], state[_WORDS]
    width, _, side, _ = patch.shape
    tokens = state["vision_model.embeddings.position_embedding"].shape[1] - 1
    text_layers = _count(state, r"text_decoder\.bert\.encoder\.layer\.(\d+)\.")
    inner = state["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0]
    config = BlipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _count(state, r"vision_model\.encoder\.layers\.(\d+)\."),
            "num_attention_heads": max(1, width // 64),
            "image_size": round(tokens**0.5) * side,
            "patch_size": side,
        },
        text_config={
            "vocab_size": words.shape[0],
            "bos_token_id": words.shape[0] - 2,
            "eos_token_id": end_token,
            "sep_token_id": end_token,
            "hidden_size": words.shape[1],
            "encoder_hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": text_layers,
            "num_attention_heads": max(1, words.shape[1] // 64),
            "max_position_embeddings": state["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        },
    )
    model = BlipForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.decoder.weight"}
    if lacking := [name for name in missing if name not in tied and not name.endswith("position_ids")]:
        raise UserError(f"--caption_weights {path}: lacks {len(lacking)} tensors of BLIP, such as {lacking[0]}")
    model.tie_weights()
    return model


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))
