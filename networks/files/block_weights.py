"""Strengths for each block of a U-Net (``--lbws``), as lists of one of four lengths."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import UserError

_IN, _OUT = (tuple(f"{side}{n:02d}" for n in range(12)) for side in ("IN", "OUT"))
_ALL = ("BASE", *_IN, "MID", *_OUT)
#: length of a list -> the blocks of its values; other blocks have a factor of 1
LAYOUTS: dict[int, tuple[str, ...]] = {
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *_OUT[:6]),
    17: ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *_OUT[3:]),
    20: ("BASE", *_IN[:9], "MID", *_OUT[:9]),
    26: _ALL,
}
_TEXT = re.compile(r"text_model_encoder_")
_LDM = re.compile(r"(input_blocks|output_blocks)_(\d+)_|(middle_block)_|(time_embed|label_emb)|_(out)_\d")
_DIFFUSERS = re.compile(r"(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_|(mid_block)_")


@dataclass(frozen=True)
class BlockWeights:
    """A factor for each block."""

    factors: dict[str, float]

    def of(self, name: str) -> float:
        """Return the factor of a module, given its published name."""
        return self.factors.get(block_of(name), 1.0)


def block_of(name: str) -> str:
    """Return ``BASE`` for text encoders, ``IN00`` ... ``OUT11`` as the original U-Net counts, "" for other parts."""
    if _TEXT.search(name):
        return "BASE"
    if found := _DIFFUSERS.search(name):
        if found[5]:
            return "MID"
        first, place = 3 * int(found[2]), int(found[4])
        if found[1] == "down":  # a level's downsampler follows its two residual blocks
            return f"IN{first + (3 if found[3] == 'downsamplers' else place + 1):02d}"
        return f"OUT{first + (2 if found[3] == 'upsamplers' else place):02d}"
    if found := _LDM.search(name):
        if found[1]:
            return f"{'IN' if found[1] == 'input_blocks' else 'OUT'}{int(found[2]):02d}"
        return "MID" if found[3] else "IN00" if found[4] else "OUT09"
    return ""


def read_block_weights(texts: Sequence[str] | None, files: int) -> list[BlockWeights | None]:
    """Read ``--lbws``: one JSON list of numbers for each file, all of one length.

    Raises:
        UserError: another number of lists than of files, no list of numbers, or an unknown length.
    """
    if not texts:
        return [None] * files
    if len(texts) != files:
        raise UserError(f"--lbws: {len(texts)} lists for {files} files; give one for each")
    read = []
    for text in texts:
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) and v == v for v in values):
            raise UserError(f"--lbws {text}: must be a list of numbers in brackets, such as [1,0.5,...]")
        if len(values) not in LAYOUTS:
            lengths = ", ".join(map(str, LAYOUTS))
            raise UserError(f"--lbws: a list of {len(values)} numbers; there are lists of {lengths}")
        read.append(values)
    if len({len(values) for values in read}) > 1:
        raise UserError(
            f"--lbws: lists of {' and '.join(str(len(v)) for v in read)} numbers; all must be of one length"
        )
    return [BlockWeights(dict(zip(LAYOUTS[len(values)], map(float, values), strict=True))) for values in read]
