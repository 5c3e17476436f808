"""Compute the weight change that one module of an adapter file makes, for every kind of adapter.

The tools that merge and compare work on these changes and not on the tensors that they are made of, so that a strength
of one half is half of the effect for each kind. With s = alpha / rank (alpha is the rank where a file has
none):

* LoRA: s U D (Hu et al. 2021, section 4.1); with ``lora_mid``, a Tucker decomposition of a convolution's kernel.
* DoRA: m V / |V| - W, V = W + s U D (Liu et al. 2024, equation 5).
* LoHa: s (A1 B1) * (A2 B2), * element by element (Hyeon-Woo et al. 2022, "FedPara", equation 2).
* LoKr: s (C kron (A B)) (Edalati et al. 2022, "KronA"); s is 1 where neither factor is decomposed.
* OFT: (R^T - I) W, R of ``networks/oft.py``.
* ``diff``: the change itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from library.errors import UserError
from networks.files.adapter_file import ALPHA, BIAS_CHANGE, DORA, DOWN, UP, WEIGHT_CHANGE, Module

MID = "lora_mid.weight"
_EPS = torch.finfo(torch.float32).eps


def change_of(module: Module, weight: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Return the change of the module's weight at strength 1.

    Args:
        weight: the weight of the model (out, in[, kh, kw]), for kinds that rotate or scale it: DoRA and OFT.
        dtype: to compute in.

    Returns:
        (out, in[, kh, kw]), on the device of ``weight`` or of the module's tensors; None if only the bias changes.

    Raises:
        UserError: an unknown kind of tensors, or a kind that needs ``weight`` where it is None.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in module.tensors.items() if name != BIAS_CHANGE}
    if weight is not None:
        tensors = {name: tensor.to(weight.device) for name, tensor in tensors.items()}
        weight = weight.to(dtype)
    if not tensors or tensors.keys() == {ALPHA}:
        return None
    compute = next((compute for sign, compute in _KINDS.items() if sign in tensors), None)
    if compute is None:
        raise UserError(f"{module.name}: holds {', '.join(sorted(tensors))}, of which no change of a weight is known")
    if needs_weight(module) and weight is None:
        raise UserError(
            f"{module.name}: {kind_of(module)} depends on the weight that it changes; merge it into a model"
        )
    change = compute(tensors, weight, module)
    if DORA in tensors:
        assert weight is not None
        change = _decomposed(change.view_as(weight), weight, tensors[DORA])
    return change


def needs_weight(module: Module) -> bool:
    """Whether the change depends on the weight that it is added to."""
    return any(name == DORA or name.startswith("oft_blocks") for name in module.tensors)


def kind_of(module: Module) -> str:
    """Return the usual name of this kind of adapter."""
    names = module.tensors.keys()
    if DORA in names:
        return "a DoRA"
    return next((title for sign, title in _TITLES.items() if any(name.startswith(sign) for name in names)), "it")


_TITLES = {
    "lora_": "a LoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_blocks": "an OFT",
    "diff": "a whole difference",
}


def _strength(tensors: Mapping[str, Tensor], rank: int) -> float:
    alpha = tensors.get(ALPHA)
    return 1.0 if alpha is None or alpha.is_meta else float(alpha) / rank


def _lora(tensors: Mapping[str, Tensor], weight: Tensor | None, module: Module) -> Tensor:
    down, up = tensors[DOWN], tensors[UP]
    strength = _strength(tensors, down.shape[0])
    if MID in tensors:
        core = tensors[MID]  # (r, r, kh, kw)
        return torch.einsum("xykl,ox,yi->oikl", core, up.flatten(1), down.flatten(1)) * strength
    product = up.flatten(1) @ down.flatten(1) * strength  # (out, in * kh * kw)
    return product.view(len(up), *down.shape[1:])


def _loha(tensors: Mapping[str, Tensor], weight: Tensor | None, module: Module) -> Tensor:
    first, second = (_hada_half(tensors, half) for half in (1, 2))
    change = first * second * _strength(tensors, tensors["hada_w1_b"].shape[0])
    # kernels are flattened into the columns
    return change if weight is None or change.shape == weight.shape else change.view_as(weight)


def _hada_half(tensors: Mapping[str, Tensor], half: int) -> Tensor:
    a, b, core = (tensors.get(name) for name in (f"hada_w{half}_a", f"hada_w{half}_b", f"hada_t{half}"))
    assert a is not None and b is not None
    if core is None:
        return a @ b
    return torch.einsum("xykl,yi,xo->oikl", core, b, a)


def _lokr(tensors: Mapping[str, Tensor], weight: Tensor | None, module: Module) -> Tensor:
    (first, rank_1), (second, rank_2) = (_lokr_factor(tensors, factor) for factor in (1, 2))
    rank = rank_2 or rank_1
    first = first.reshape(*first.shape, *(1,) * (second.dim() - first.dim()))
    change = torch.kron(first, second.contiguous())
    change = change * (_strength(tensors, rank) if rank else 1.0)
    return change if weight is None or change.shape == weight.shape else change.view_as(weight)


def _lokr_factor(tensors: Mapping[str, Tensor], factor: int) -> tuple[Tensor, int | None]:
    """Return (a factor, its rank if it is decomposed)."""
    whole = tensors.get(f"lokr_w{factor}")
    if whole is not None:
        return whole, None
    a, b = tensors[f"lokr_w{factor}_a"], tensors[f"lokr_w{factor}_b"]
    core = tensors.get(f"lokr_t{factor}")
    if core is None:
        return (a @ b.flatten(1)).view(len(a), *b.shape[1:]), b.shape[0]
    return torch.einsum("xykl,xo,yi->oikl", core, a, b), b.shape[0]


def _difference(tensors: Mapping[str, Tensor], weight: Tensor | None, module: Module) -> Tensor:
    return tensors[WEIGHT_CHANGE]


def _decomposed(change: Tensor, weight: Tensor, magnitudes: Tensor) -> Tensor:
    """Return W' - W of a DoRA; magnitudes are (out, 1[, 1, 1]) or (1, in[, 1, 1])."""
    changed = weight + change
    kept = 0 if magnitudes.shape[0] == weight.shape[0] else 1
    axes = [axis for axis in range(changed.dim()) if axis != kept]
    norms = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
    magnitudes = magnitudes.reshape(norms.shape)
    return changed * (magnitudes / norms.clamp(min=_EPS)) - weight


def _rotation(tensors: Mapping[str, Tensor], weight: Tensor | None, module: Module) -> Tensor:
    """Return (R^T - I) W of a Diag-OFT; files of ``networks.oft`` are read as one, see oft.py."""
    assert weight is not None
    blocks, alpha = tensors["oft_blocks"], tensors.get(ALPHA)
    if blocks.dim() != 3 or "rescale" in tensors:
        raise UserError(
            f"{module.name}: a BOFT, or an OFT with magnitudes, which is not merged here; use lycoris.kohya"
        )
    skew = blocks - blocks.transpose(1, 2)
    # the bound of LyCORIS: alpha for each output feature, 0 for no bound
    if alpha is not None and not alpha.is_meta and (bound := float(alpha) * weight.shape[0]) > 0:
        norm = torch.linalg.vector_norm(skew)
        skew = skew * (bound / norm.clamp(min=bound))
    unit = torch.eye(blocks.shape[-1], dtype=skew.dtype, device=skew.device)
    moved = torch.linalg.solve(unit - skew, 2.0 * skew)
    parts = weight.reshape(*blocks.shape[:2], -1)  # (n, k, in * kh * kw)
    return torch.einsum("nkm,nki->nmi", moved, parts).reshape(weight.shape)


def change_shape(module: Module, place_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of the module's change for a weight of ``place_shape``, without computing it.

    Raises:
        UserError: as ``change_of``, or its tensors do not fit each other or the weight.
    """
    meta = replace(module, tensors={name: tensor.to("meta") for name, tensor in module.tensors.items()})
    try:
        change = change_of(meta, torch.empty(place_shape, device="meta"))
    except (RuntimeError, KeyError, AssertionError):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in module.tensors.items())
        raise UserError(f"{module.name}: its tensors ({shapes}) fit no weight of {list(place_shape)}") from None
    return None if change is None else tuple(change.shape)


#: a tensor that only this kind has -> how its change is computed
_KINDS: dict[str, Callable[[Mapping[str, Tensor], Tensor | None, Module], Tensor]] = {
    DOWN: _lora,
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "oft_blocks": _rotation,
    WEIGHT_CHANGE: _difference,
}
