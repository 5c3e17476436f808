"""Find the size of a feature map from its number of tokens."""

from __future__ import annotations

import functools
import math


@functools.lru_cache(maxsize=256)
def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Return (h, w) with ``h * w == tokens`` whose shape is nearest to that of latents (height, width).

    Levels of a U-Net halve the latents and round up, and some features resize them, so that the tokens' number alone
    is known inside of a layer.
    """
    wanted = math.log(height / width)
    sides = [h for h in range(1, math.isqrt(tokens) + 1) if tokens % h == 0]
    pairs = [pair for h in sides for pair in ((h, tokens // h), (tokens // h, h))]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1]) - wanted))
