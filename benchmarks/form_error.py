"""How far predictions move when frozen weights are kept in fp8, int8 or NF4: python benchmarks/form_error.py

One block of each kind of FLUX.1 at full size, with random weights whose statistics are like those of trained ones, and
the block's output in float32 as the truth. For each form: the relative error of the change that the block makes,
|change - true change| / |true change|, that of the gradient with respect to its input, and how much of the error comes on
top of bfloat16's own. Takes 3 GB and some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from library.architectures.flux.model import DoubleStreamBlock, SingleStreamBlock, rotation
from library.architectures.flux.sizes import FluxSizes
from library.memory.forms import FORMS
from library.memory.stored_layers import store_weights

#: standard deviations of rows differ by this much around 1 / sqrt(inputs), and those of single weights within a row by
#: this much, which gives heavier tails than those of a normal distribution; both as the logarithm's standard deviation
_ROWS, _TAILS = 0.35, 0.35
#: a few features of tokens are far larger than the others, as in trained transformers
_LARGE, _TIMES = 0.005, 20.0


@torch.no_grad()
def fill(block: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of a block."""
    for name, parameter in block.named_parameters():
        if parameter.dim() < 2:
            start = 1.0 if "norm" in name else 0.0
            parameter.copy_(start + 0.1 * torch.randn(parameter.shape, generator=generator))
            continue
        rows, inputs = parameter.shape
        tails = torch.randn(rows, inputs, generator=generator).mul_(_TAILS).exp_()
        factors = torch.exp(_ROWS * torch.randn(rows, 1, generator=generator)) * inputs**-0.5
        parameter.copy_(tails.mul_(torch.randn(rows, inputs, generator=generator)).mul_(factors))


def inputs_of(sizes: FluxSizes, tokens: int, text: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return image (1, N, D), text (1, T, D) and the conditioning vector (1, D)."""
    width = torch.ones(sizes.hidden)
    large = torch.randperm(sizes.hidden, generator=generator)[: int(_LARGE * sizes.hidden)]
    width[large] = _TIMES
    image, words = (torch.randn(1, count, sizes.hidden, generator=generator) * width for count in (tokens, text))
    return image, words, torch.randn(1, sizes.hidden, generator=generator)


def run(
    block: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], turn: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the change that a block makes to its tokens (1, L, D), and the gradient of a fixed projection of it."""
    image, text, vector = (x.to(dtype) for x in inputs)
    x = torch.cat([text, image], dim=1).requires_grad_()
    if isinstance(block, SingleStreamBlock):
        out = block(x, vector, turn, None)
    else:
        parts = block(x[:, text.shape[1] :], x[:, : text.shape[1]], vector, turn, None)
        out = torch.cat(parts[::-1], dim=1)
    change = out.float() - x.detach().float()
    direction = torch.randn(change.shape, generator=torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad((change * direction).sum(), x)
    return change.detach(), gradient.float() - direction  # without the part that goes around the block


def apart(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="image tokens, a square number")
    parser.add_argument("--text", type=int, default=16)
    parser.add_argument("--forms", nargs="*", default=["fp8", "fp8_scaled", "int8", "nf4"])
    parser.add_argument("--width", type=int, default=3072, help="features of a token; FLUX.1 has 3072")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    sizes = FluxSizes(hidden=args.width, mlp=4 * args.width)
    side = int(args.tokens**0.5)
    turn = rotation(side, side, args.text, sizes.rope_axes, text_first=True, device="cpu")
    inputs = inputs_of(sizes, side * side, args.text, generator)
    print("block | form | error of the output | error of the gradient | seconds")
    kinds = {
        "double": lambda: DoubleStreamBlock(sizes, modulation=True, text_first=True),
        "single": lambda: SingleStreamBlock(sizes, modulation=True),
    }
    for name, made in kinds.items():
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            empty = made().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        master = empty.to_empty(device="cpu")
        fill(master, torch.Generator().manual_seed(1))
        # the weights of files are bfloat16: the truth computes with these numbers in float32
        truth = run(copy.deepcopy(master).float(), inputs, turn, torch.float32)
        for form in (None, *args.forms):
            began = time.perf_counter()
            block = copy.deepcopy(master)
            if form is not None:
                store_weights(block, form, torch.device("cpu"), blocks=[[block]])
            found = run(block, inputs, turn, torch.bfloat16)
            errors = [apart(*pair) for pair in zip(found, truth, strict=True)]
            title = "bfloat16" if form is None else FORMS[form].title
            seconds = time.perf_counter() - began
            print(f"{name} | {title} | {errors[0]:.2%} | {errors[1]:.2%} | {seconds:.0f}", flush=True)


if __name__ == "__main__":
    main()
