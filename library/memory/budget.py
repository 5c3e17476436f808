"""Choose how a run keeps its model, so that it fits into a budget of device memory (``--memory_plan``).

The peak of a step is the sum of what is there all the time (weights, trained weights, optimizer state) and of what the
traced step adds (activations, gradients). Choices are tried from the cheapest in time to the dearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from library.memory.block_stream import largest_count, spread, swapped_counts
from library.memory.forms import BLOCK
from library.memory.stored_layers import stored_layers_of

#: bytes of a form for each number, without its scales
_BYTES = {"fp8": 1.0, "fp8_scaled": 1.0, "int8": 1.0, "nf4": 0.5}


@dataclass(frozen=True)
class Choice:
    """A way of keeping the denoiser."""

    checkpointing: bool
    form: str | None = None  # in ``FORMS``
    swapped: int = 0
    small_state: bool = False  # optimizer state of 8 bits

    def describe(self, flags: Mapping[str, str]) -> str:
        """Return the options on the command line; ``flags`` has those of forms."""
        words = ["--gradient_checkpointing"] if self.checkpointing else []
        words += [flags[self.form]] if self.form is not None else []
        words += [f"--blocks_to_swap {self.swapped}"] if self.swapped else []
        words += ["--optimizer_type AdamW8bit"] if self.small_state else []
        return " ".join(words) or "nothing more"


@dataclass(frozen=True)
class Parts:
    """Bytes on the device."""

    frozen: int  # weights that are not trained
    trained: int
    state: int  # of the optimizer
    step: int  # activations and gradients at the worst moment

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.state + self.step


def choices(
    *,
    checkpointing: bool,
    forms: Sequence[str | None],
    most_swapped: int,
    swapped: int,
    small_states: Sequence[bool],
) -> Iterator[Choice]:
    """Yield choices from the cheapest to the dearest.

    Args:
        checkpointing: whether it is asked for, so that no choice is without.
        forms: possible forms, the present one first.
        most_swapped: 0 if blocks cannot be swapped.
        swapped: as asked for; then no other number is tried.
    """
    counts = [swapped] if swapped else list(range(most_swapped + 1))
    for small in small_states:
        if not checkpointing and not swapped:
            yield Choice(False, forms[0], 0, small)
        for form in forms:
            if not swapped:
                yield Choice(True, form, 0, small)
        for form in forms:
            for count in counts:
                if count:
                    yield Choice(True, form, count, small)


def most_swapped(blocks: Sequence[Sequence[nn.Module]]) -> int:
    """Return how many blocks can be swapped."""
    lengths = [len(listed) for listed in blocks]
    return largest_count(lengths, sum(lengths)) if lengths else 0


def denoiser_bytes(model: nn.Module, blocks: Sequence[Sequence[nn.Module]], choice: Choice) -> int:
    """Return the bytes of a model's weights on the device, and of one layer at full size where it is dequantized."""
    small = {} if choice.form is None else {id(m.weight): m.weight for m, _ in stored_layers_of(model, blocks)}
    sizes = {id(t): _size(t, choice.form if id(t) in small else None) for t in (*model.parameters(), *model.buffers())}
    total = sum(sizes.values())
    if choice.swapped:
        # each shape of block has two buffers instead of its own memory
        counts = swapped_counts([len(listed) for listed in blocks], choice.swapped)
        for listed, count in zip(blocks, counts, strict=True):
            if not count:
                continue
            weights = [sum(sizes[id(t)] for t in (*b.parameters(), *b.buffers())) for b in listed]
            total -= sum(weights[place] for place in spread(len(listed), count))
            total += 2 * max(weights)
    return total + max((weight.nbytes for weight in small.values()), default=0)


def _size(tensor: torch.Tensor, form: str | None) -> int:
    if form is None:
        return tensor.nbytes
    rows = tensor.shape[0]
    scales = tensor.numel() // BLOCK if form in ("fp8_scaled", "nf4") else rows
    return int(tensor.numel() * _BYTES[form]) + 4 * scales
