"""Parts of a prompt and networks for regions of an image: attention couple and regional LoRA.

Each part of the prompt is attended to by itself, and the results are blended by the masks behind the cross-attention.
Network i acts for part i alone: in its text, its keys and values, and elsewhere within its mask.

Shape legend: B images, n parts, R rows of the U-Net (negative B, prompt B, empty B, where there are those), E rows of
the text (negative B, then B of each part, empty B), T tokens of an image's features, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.architectures.common.token_grid import token_grid
from library.architectures.conditioning import Conditioning
from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.denoise import CONTROL_CONDITIONING, Denoise, Feature, Generation, StepInfo
from library.inference.models import ImageModels
from library.inference.region_masks import parts_of, read_regions, resized
from library.inference.sources import warn_if_stretched
from networks.base import AdapterNetwork

#: keeps the blend finite where no part has a region
_SMALL = 1e-4


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch."""

    images: int  # B
    parts: int  # n
    negative: bool
    empty: bool

    @property
    def first(self) -> int:
        """Return the first row of the prompt."""
        return self.images if self.negative else 0

    def of_part(self, part: int) -> slice:
        """Return the text rows of a part."""
        start = self.first + part * self.images
        return slice(start, start + self.images)

    def expand(self, tensor: Tensor) -> Tensor:
        """(R, ...) -> (E, ...): the prompt's rows once for each part."""
        b, start = self.images, self.first
        rows = [tensor[:start], *[tensor[start : start + b]] * self.parts, tensor[start + b :]]
        return torch.cat(rows)


class Regions(Feature):
    """Blend the parts of the prompts by the masks of ``regions``."""

    order = 5

    def __init__(self) -> None:
        self._rows: _Rows | None = None
        self._masks = torch.empty(0)  # (n, H, W)
        self._size = (1, 1)  # (h, w) of latents
        self._levels: dict[tuple[int, ...], Tensor] = {}
        self._models: ImageModels | None = None

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether there is a map of regions."""
        return settings.regions is not None

    @classmethod
    def load(
        cls, options: Any, models: ImageModels, checkpoint: Any, dtype: torch.dtype, device: torch.device
    ) -> int | None:
        """Return how many regions pure colors mark; None for channels."""
        return options.networks.network_regional_mask_max_color_codes

    def prepare(self, generation: Generation) -> None:
        models, first = generation.models, generation.first
        assert first.regions is not None and first.region_count is not None
        networks = regional_networks(models, first.region_count)
        self._models = models
        self._size = (generation.noise.shape[-2], generation.noise.shape[-1])
        codes = models.of_features.get(Regions)
        warn_if_stretched(first.regions, (first.width, first.height))
        self._masks = read_regions(first.regions, first.region_count, codes).to(generation.noise.device)
        guided = first.scale != 1.0
        rows = _Rows(len(generation.settings), first.region_count, guided, guided and first.negative_scale is not None)
        self._rows = rows
        generation.conditioning, shared = _encoded(generation, rows, networks)
        generation.facts[CONTROL_CONDITIONING] = shared

    def wrap(self, denoise: Denoise) -> Denoise:
        def blended(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            assert self._models is not None
            with self._coupled(self._models):
                return denoise(noisy, timesteps, step)

        return blended

    # ---- inside of the U-Net ----

    @contextlib.contextmanager
    def _coupled(self, models: ImageModels) -> Iterator[None]:
        """Attend to each part by itself, and keep each network within its region."""
        assert models.denoiser is not None and self._rows is not None
        attentions: list[Any] = [m for n, m in models.denoiser.named_modules() if n.endswith(".attn2")]
        processors = [attention.processor for attention in attentions]
        gates = [
            (adapter, self._gate(number, path))
            for number, network in enumerate(regional_networks(models, self._rows.parts))
            for part in network.parts
            if not part.is_text_encoder
            for path, adapter in part.adapters.items()
        ]
        try:
            for attention in attentions:
                attention.processor = self._attend
            for adapter, gate in gates:
                adapter.gate = gate
            yield
        finally:
            for attention, processor in zip(attentions, processors, strict=True):
                attention.processor = processor
            for adapter, _ in gates:
                adapter.gate = None

    def _gate(self, number: int, path: str) -> Callable[[Tensor], Tensor]:
        """Return what is left of network ``number``'s change of a layer."""
        rows = self._rows
        assert rows is not None

        def only_its_text(change: Tensor) -> Tensor:
            kept = torch.zeros_like(change)
            kept[rows.of_part(number)] = change[rows.of_part(number)]
            return kept

        def only_its_output(change: Tensor) -> Tensor:
            # the blend divides by the sum of the masks, which is for the attention alone
            masks = self._token_masks(change.shape[1], change)
            return only_its_text(change) * (masks.sum(0) + _SMALL)

        def within_its_mask(change: Tensor) -> Tensor:
            if change.dim() == 4:
                return change * self._level(change.shape[-2:], change)[number]  # (h, w)
            if change.dim() == 3:
                return change * self._token_masks(change.shape[1], change)[number]
            return change / rows.parts  # of the time embedding, which has no places

        if path.endswith((".attn2.to_k", ".attn2.to_v")):
            return only_its_text
        return only_its_output if path.endswith(".attn2.to_out.0") else within_its_mask

    def _attend(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Cross-attention (R, T, D) to all parts' text (E, S, C), blended to (R, T, D)."""
        rows = self._rows
        assert rows is not None
        query = rows.expand(attention.to_q(hidden_states))
        key, value = attention.to_k(encoder_hidden_states), attention.to_v(encoder_hidden_states)
        query, key, value = (_split(tensor, attention.heads) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)  # (E, heads, T, d) -> (E, T, D)
        out = attention.to_out[1](attention.to_out[0](out))
        masks = self._token_masks(out.shape[1], out)  # (n, T, 1)
        found = torch.stack([out[rows.of_part(part)] for part in range(rows.parts)])  # (n, B, T, D)
        blend = (masks.unsqueeze(1) * found).sum(0) / (masks.sum(0) + _SMALL)
        last = rows.of_part(rows.parts - 1).stop
        return torch.cat([out[: rows.first], blend, out[last:]]) / attention.rescale_output_factor

    def _level(self, size: Sequence[int], like: Tensor) -> Tensor:
        """Return the masks (n, h, w) at a size of features."""
        found = self._levels.get(tuple(size))
        if found is None:
            found = self._levels[tuple(size)] = resized(self._masks, size[0], size[1])
        return found.to(like.dtype)

    def _token_masks(self, tokens: int, like: Tensor) -> Tensor:
        """Return the masks (n, T, 1) of flattened features."""
        return self._level(token_grid(tokens, *self._size), like).flatten(1).unsqueeze(-1)


def _split(tensor: Tensor, heads: int) -> Tensor:
    """(E, T, D) -> (E, heads, T, d)."""
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2)


def regional_networks(models: ImageModels, parts: int) -> Sequence[AdapterNetwork]:
    """Return the networks, of which each is for one part.

    Raises:
        UserError: there are more networks than parts, or networks of other projects among them.
    """
    if len(models.adapters) > parts:
        raise UserError(
            f"--mask_path: {len(models.adapters)} networks for {parts} parts of the prompt; join as many parts with AND"
        )
    found = []
    for network, name in zip(models.adapters, models.adapter_names, strict=True):
        if not isinstance(network, AdapterNetwork):
            raise UserError(
                f"--mask_path: the network module of {name} cannot be kept within a region; use one of networks.*"
            )
        found.append(network)
    return found


@contextlib.contextmanager
def _text_of(chosen: int | None, networks: Sequence[AdapterNetwork]) -> Iterator[None]:
    """Encode text with the adapters of one network, or of none."""
    others = [
        adapter
        for number, network in enumerate(networks)
        if number != chosen
        for adapter in network.text_encoder_loras
        if adapter.enabled
    ]
    try:
        for adapter in others:
            adapter.enabled = False
        yield
    finally:
        for adapter in others:
            adapter.enabled = True


def _encoded(
    generation: Generation, rows: _Rows, networks: Sequence[AdapterNetwork]
) -> tuple[Conditioning, Conditioning]:
    """Return the U-Net's conditioning, with E rows of text, and that of models that know no parts, with the last."""
    prompts = [parts_of(settings.prompt) for settings in generation.settings]
    found: list[Conditioning] = []
    before = after = None
    with _text_of(None, networks):
        if rows.negative:
            before = generation.encode_afresh([s.negative_prompt for s in generation.settings], True)
        if rows.empty:
            after = generation.encode_afresh([""] * rows.images, False)
    for part in range(rows.parts):
        with _text_of(part, networks):
            found.append(generation.encode_afresh([prompt[part] for prompt in prompts], False))
    ends = ([before] if before is not None else []), ([after] if after is not None else [])
    expanded = Conditioning.cat([*ends[0], *found, *ends[1]])
    shared = Conditioning.cat([*ends[0], found[-1], *ends[1]])
    # pooled text and sizes are one for each row of the U-Net
    tensors = {name: expanded[name] if tensor.dim() == 3 else tensor for name, tensor in shared.tensors.items()}
    return Conditioning(tensors), shared
