"""Map adapter names to the weights they change, from a model file's tensor names alone: no model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.architectures.common.recognise import refuse_scaled
from library.architectures.flux.names import SIGN
from library.errors import UserError
from networks.conversion.families import FLUX_OR_CHROMA, Part


@dataclass(frozen=True)
class ModelPart:
    """One of a family's models in files.

    Attributes:
        part: the naming of its adapters.
        title: for messages.
        sign: the beginning of some tensor's name, after the file's prefix.
        level: a further prefix of module paths.
    """

    part: Part
    title: str
    sign: str
    level: str = ""

    def lora_keys(self, shapes: Mapping[str, tuple[int, ...]], source: object) -> dict[str, str]:
        """Return published adapter name -> the weight in the file that it changes, for every weight of the model.

        Raises:
            UserError: the weights of the file, ``source``, are quantised with scales.
        """
        prefix = next((name[: name.index(self.sign)] for name in shapes if self.sign in name), "")
        own = [name for name in shapes if name.startswith(prefix)]
        try:
            refuse_scaled(own)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        return {
            self.part.name("kohya", self.level + name[len(prefix) :].removesuffix(".weight")): name
            for name in own
            if name.endswith(".weight")
        }


_TRANSFORMER, _CLIP_L, _T5XXL = FLUX_OR_CHROMA.parts
#: FLUX.1 and Chroma in the published layout
TRANSFORMER = ModelPart(_TRANSFORMER, "transformer", SIGN)
#: with or without the level ``text_model.``, as bundled files and newer transformers have it
CLIP_L = ModelPart(_CLIP_L, "CLIP-L", "encoder.layers.", level="text_model.")
T5XXL = ModelPart(_T5XXL, "T5-XXL", "encoder.block.")
PARTS = (TRANSFORMER, CLIP_L, T5XXL)
