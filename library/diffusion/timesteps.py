"""Draw the timestep at which a sample is trained.

Timesteps of DDPM are whole numbers, each as likely as the others. Flow matching draws a noise level sigma from a
density on (0, 1): ``Density`` gives its distribution function and its inverse, the quantiles. So a draw needs one
uniform number, a range of timesteps truncates the density, and fixed levels divide it evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import torch

from library.diffusion.flow import shift_sigma
from library.errors import UserError


def sample_timestep(generator: torch.Generator, min_timestep: int, max_timestep: int) -> int:
    """Draw a timestep uniformly from ``min_timestep`` to ``max_timestep - 1``.

    Raises:
        ValueError: the range is empty.
    """
    if min_timestep >= max_timestep:
        raise ValueError(f"no timestep lies between {min_timestep} and {max_timestep}")
    return int(torch.randint(min_timestep, max_timestep, (1,), generator=generator))


def spread_timesteps(min_timestep: int, max_timestep: int, count: int) -> tuple[int, ...]:
    """Return the middles of ``count`` equal parts of ``min_timestep`` to ``max_timestep``: the midpoint rule.

    A mean over them approximates the mean over all timesteps of ``sample_timestep``. There are fewer where the range
    has fewer than ``count``.
    """
    part = (max_timestep - min_timestep) / count
    return tuple(sorted({min_timestep + int((index + 0.5) * part) for index in range(count)}))


# ---- densities of flow matching ----


class Density(Protocol):
    """A density of noise levels on (0, 1)."""

    def cdf(self, sigma: float) -> float:
        """Return the probability below ``sigma``, 0 to 1."""

    def quantile(self, share: float) -> float:
        """Return the noise level below which this share of the density is: the inverse of ``cdf``."""


@dataclass(frozen=True)
class Uniform:
    """All noise levels are equally likely."""

    def cdf(self, sigma: float) -> float:
        return sigma

    def quantile(self, share: float) -> float:
        return share


@dataclass(frozen=True)
class LogitNormal:
    """sigma = sigmoid(z), z normal (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def cdf(self, sigma: float) -> float:
        if not 0.0 < sigma < 1.0:
            return 0.0 if sigma <= 0.0 else 1.0
        return NormalDist(self.mean, self.std).cdf(math.log(sigma) - math.log1p(-sigma))

    def quantile(self, share: float) -> float:
        if not 0.0 < share < 1.0:
            return 0.0 if share <= 0.0 else 1.0
        z = NormalDist(self.mean, self.std).inv_cdf(share)
        # the form of sigmoid whose exponential stays small
        return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


@dataclass(frozen=True)
class Mode:
    """sigma = f_mode(u), u uniform: more in the middle for scales above 0, more at the ends below (eq. 20).

    f_mode(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), which falls from 1 to 0, so a quantile is f_mode(1 - share).
    """

    scale: float = 1.29

    def cdf(self, sigma: float) -> float:
        if not 0.0 < sigma < 1.0:
            return 0.0 if sigma <= 0.0 else 1.0
        low, high = 0.0, 1.0
        while high - low > 1e-15:  # no closed form; each round halves the interval
            middle = (low + high) / 2.0
            if middle in (low, high):
                break
            low, high = (middle, high) if self.quantile(middle) < sigma else (low, middle)
        return (low + high) / 2.0

    def quantile(self, share: float) -> float:
        u = 1.0 - share
        return 1.0 - u - self.scale * (math.cos(math.pi * u / 2.0) ** 2 - 1.0 + u)


@dataclass(frozen=True)
class Mirrored:
    """1 - sigma, sigma from another density."""

    density: Density

    def cdf(self, sigma: float) -> float:
        return 1.0 - self.density.cdf(1.0 - sigma)

    def quantile(self, share: float) -> float:
        return 1.0 - self.density.quantile(1.0 - share)


@dataclass(frozen=True)
class Shifted:
    """``shift_sigma`` of another density's levels."""

    density: Density
    shift: float

    def cdf(self, sigma: float) -> float:
        return self.density.cdf(shift_sigma(sigma, 1.0 / self.shift))

    def quantile(self, share: float) -> float:
        return shift_sigma(self.density.quantile(share), self.shift)


#: a smaller share of a density between two noise levels counts as none
_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class Truncated:
    """A density truncated to the range between two noise levels, where it keeps its shape.

    So a run over a range trains what a run without it trains there, and ranges that meet divide the work between them.
    Squeezing the density into the range instead would move its peak.

    Raises:
        UserError: almost none of the density is between them.
    """

    density: Density
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.density.cdf(self.high) - self.density.cdf(self.low) < _LEAST_SHARE:
            raise UserError(
                f"--min_timestep {self.low * 1000:g} and --max_timestep {self.high * 1000:g}: the chosen timestep "
                "density has next to nothing between them; widen the range, or take another --timestep_sampling"
            )

    def cdf(self, sigma: float) -> float:
        below, above = self.density.cdf(self.low), self.density.cdf(self.high)
        return (self.density.cdf(min(max(sigma, self.low), self.high)) - below) / (above - below)

    def quantile(self, share: float) -> float:
        below, above = self.density.cdf(self.low), self.density.cdf(self.high)
        return min(max(self.density.quantile(below + share * (above - below)), self.low), self.high)


def sample_share(generator: torch.Generator) -> float:
    """Draw a number from [0, 1) in double precision, the argument of a quantile."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def density_of(
    sampling: str,
    *,
    weighting_scheme: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    sigmoid_scale: float = 1.0,
    shift: float = 1.0,
    size_shift: float = 1.0,
) -> Density:
    """Return the density of ``--timestep_sampling``.

    ``sigma``: a number u is drawn as ``--weighting_scheme`` says. It is an index into a sampler's table of noise
    levels, which begins with the highest, as in diffusers' training scripts: 1 - u, shifted by ``shift``. So a positive
    ``logit_mean`` means less noise, unlike in Esser et al. 2024. ``uniform``: every level alike. ``sigmoid``:
    sigmoid(sigmoid_scale z), z standard normal. ``shift``: that, shifted by ``shift``. ``flux_shift``: that, shifted by
    ``size_shift``. ``nextdit_shift``: ``uniform`` shifted by ``size_shift``. ``weighting``: u of ``sigma`` is the level
    itself, shifted by ``shift``, as in Esser et al. 2024: a positive ``logit_mean`` means more noise.

    Args:
        size_shift: ``resolution_shift`` of the image.

    Raises:
        ValueError: an unknown name.
    """
    if sampling in ("sigma", "weighting"):
        drawn: Density = Uniform()
        if weighting_scheme == "logit_normal":
            drawn = LogitNormal(logit_mean, logit_std)
        elif weighting_scheme == "mode":
            drawn = Mode(mode_scale)
        return Shifted(Mirrored(drawn) if sampling == "sigma" else drawn, shift)
    if sampling in ("uniform", "nextdit_shift"):
        return Shifted(Uniform(), size_shift) if sampling == "nextdit_shift" else Uniform()
    shifts = {"sigmoid": 1.0, "shift": shift, "flux_shift": size_shift}
    if sampling not in shifts:
        raise ValueError(f"unknown timestep sampling {sampling!r}")
    return Shifted(LogitNormal(0.0, sigmoid_scale), shifts[sampling])
