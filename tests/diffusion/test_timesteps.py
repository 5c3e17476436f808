"""Each density of noise levels: keyed draws against its distribution in closed form, and ranges of timesteps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from library.diffusion.flow import resolution_shift, shift_sigma
from library.diffusion.objective import FlowObjective, TimestepRange
from library.diffusion.timesteps import LogitNormal, Mode, Shifted, Truncated, Uniform, density_of, spread_timesteps
from library.errors import UserError
from library.randomness import torch_generator

WHOLE = TimestepRange()
#: latents of an image with 1024 tokens of 2 x 2 cells
SIZE = (64, 64)
#: mu for them: 0.5 + 0.65 * (1024 - 256) / 3840
MU = 0.63
COUNT = 1500
#: Kolmogorov-Smirnov: sqrt(n) D is above this for one sample in a thousand (Smirnov 1948)
BOUND = 1.95

Cdf = Callable[[float], float]


def phi(z: float) -> float:
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def logit(sigma: float) -> float:
    return math.log(sigma / (1.0 - sigma))


def drawn(objective: FlowObjective, within: TimestepRange = WHOLE, size: tuple[int, int] = SIZE) -> list[float]:
    generators = [torch_generator(visit, "timestep") for visit in range(COUNT)]
    timesteps = objective.draw(generators, within, size)
    assert timesteps.dtype == torch.float32 and timesteps.shape == (COUNT,)
    return sorted((timesteps.double() / 1000).tolist())


def distance(sample: list[float], cdf: Cdf) -> float:
    """sqrt(n) times the largest distance between the sample's distribution and ``cdf``."""
    n = len(sample)
    worst = max(max((i + 1) / n - cdf(x), cdf(x) - i / n) for i, x in enumerate(sample))
    return worst * math.sqrt(n)


#: options, distribution function of sigma
DENSITIES: list[tuple[dict[str, object], Cdf]] = [
    ({"timestep_sampling": "uniform"}, lambda s: s),
    ({"timestep_sampling": "sigmoid"}, lambda s: phi(logit(s))),
    ({"timestep_sampling": "sigmoid", "sigmoid_scale": 2.0}, lambda s: phi(logit(s) / 2.0)),
    ({"timestep_sampling": "shift", "shift": 3.1582}, lambda s: phi(logit(s) - math.log(3.1582))),
    (
        {"timestep_sampling": "shift", "shift": 3.0, "sigmoid_scale": 0.5},
        lambda s: phi((logit(s) - math.log(3.0)) / 0.5),
    ),
    ({"timestep_sampling": "flux_shift"}, lambda s: phi(logit(s) - MU)),
    ({"timestep_sampling": "nextdit_shift"}, lambda s: 1.0 / (1.0 + math.exp(MU) * (1.0 / s - 1.0))),
    # sigma = 3 (1 - u) / (1 + 2 (1 - u)), so 1 - u = sigma / (3 - 2 sigma)
    ({"timestep_sampling": "sigma", "shift": 3.0}, lambda s: s / (3.0 - 2.0 * s)),
    (
        {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 0.7},
        lambda s: 1.0 - phi((logit(1.0 - s) - 0.5) / 0.7),
    ),
]


def name_of(value: object) -> str:
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("options", "cdf"), DENSITIES, ids=name_of)
def test_draws_follow_the_formula(options: dict[str, object], cdf: Cdf) -> None:
    objective = FlowObjective(**options)
    assert distance(drawn(objective), cdf) < BOUND
    # the bound is tight enough to tell densities apart
    assert distance(drawn(objective), lambda s: cdf(min(s * 1.2, 1 - 1e-9))) > BOUND


@pytest.mark.parametrize(("options", "cdf"), DENSITIES, ids=name_of)
def test_a_range_cuts_the_density_off(options: dict[str, object], cdf: Cdf) -> None:
    """The density within the range keeps its shape, and nothing outside of it is drawn."""
    within = TimestepRange(300, 850)
    found = drawn(FlowObjective(**options), within)
    assert 0.3 <= found[0] and found[-1] < 0.85
    low, high = cdf(0.3), cdf(0.85)
    assert distance(found, lambda s: (cdf(s) - low) / (high - low)) < BOUND


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("logit_normal", {"logit_mean": -0.4, "logit_std": 1.3}),
        ("mode", {"mode_scale": 1.29}),
        ("mode", {"mode_scale": -0.9}),
        ("uniform", {}),
        ("cosmap", {}),
    ],
)
def test_weighting_schemes_draw_as_diffusers_does(scheme: str, settings: dict[str, float]) -> None:
    """The place in the table of noise levels, which begins with the highest."""
    arguments = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **settings}
    generator = torch.Generator().manual_seed(0)
    places = compute_density_for_timestep_sampling(scheme, 100_000, generator=generator, **arguments).sort().values
    expected = (1.0 - places).flip(0)

    def share_below(sigma: float) -> float:
        return torch.searchsorted(expected, sigma).item() / len(expected)

    found = drawn(FlowObjective(weighting_scheme=scheme, **settings))
    assert distance(found, share_below) < BOUND


def test_quantiles_worked_by_hand() -> None:
    assert Uniform().quantile(0.3) == Uniform().cdf(0.3) == 0.3
    # the normal's 84.13447 % lie below 1; sigmoid(1) = 0.7310586
    assert LogitNormal().quantile(0.8413447460685429) == pytest.approx(0.7310585786300049)
    assert LogitNormal(1.0, 2.0).quantile(0.5) == pytest.approx(0.7310585786300049)
    # f_mode(0.5) = 0.5; f_mode(1/3) = 2/3 - 1.29 (0.75 - 2/3)
    assert Mode(1.29).quantile(0.5) == pytest.approx(0.5)
    assert Mode(1.29).quantile(2 / 3) == pytest.approx(2 / 3 - 1.29 / 12)
    assert shift_sigma(0.5, 3.0) == 0.75
    assert Shifted(Uniform(), 3.0).quantile(0.5) == 0.75
    # two tails of the middle half
    assert Truncated(Uniform(), 0.25, 0.75).quantile(0.5) == 0.5
    assert Truncated(Uniform(), 0.25, 0.75).cdf(0.375) == 0.25


@pytest.mark.parametrize(
    "density",
    [
        Uniform(),
        LogitNormal(0.3, 0.8),
        Mode(1.29),
        Mode(-1.0),
        Mode(1.75),
        Shifted(Mode(0.8), 3.0),
        LogitNormal(0.0, 3.0),
    ],
    ids=repr,
)
def test_quantile_and_distribution_are_inverse(density: Mode) -> None:
    for share in (1e-6, 0.01, 0.3, 0.5, 0.77, 0.999):
        assert density.cdf(density.quantile(share)) == pytest.approx(share, abs=1e-9)
    assert (density.cdf(0.0), density.cdf(1.0)) == (0.0, 1.0)
    assert (density.quantile(0.0), density.quantile(1.0)) == (0.0, 1.0)


def test_the_shift_by_resolution() -> None:
    """mu is 0.5 for 256 tokens, an image of 256 pixels, and 1.15 for 4096, one of 1024."""
    assert math.log(resolution_shift(256)) == pytest.approx(0.5)
    assert math.log(resolution_shift(4096)) == pytest.approx(1.15)
    assert math.log(resolution_shift(1024)) == pytest.approx(MU)
    small = drawn(FlowObjective(timestep_sampling="flux_shift"), size=(32, 32))
    assert distance(small, lambda s: phi(logit(s) - 0.5)) < BOUND
    # four times the cells to a token: 1024 tokens of (128, 128) latents
    coarse = FlowObjective(timestep_sampling="flux_shift", cells_per_token=16)
    assert drawn(coarse, size=(128, 128)) == drawn(FlowObjective(timestep_sampling="flux_shift"))


def test_a_draw_depends_on_its_visit_alone() -> None:
    objective = FlowObjective(timestep_sampling="flux_shift")
    many = objective.draw([torch_generator(visit, "timestep") for visit in (5, 6, 7)], WHOLE, SIZE)
    one = objective.draw([torch_generator(6, "timestep")], WHOLE, SIZE)
    assert many[1] == one[0]
    assert len(set(many.tolist())) == 3


def test_the_end_of_a_range_is_not_reached_by_rounding() -> None:
    one = TimestepRange(999, 1000)
    found = FlowObjective(timestep_sampling="uniform").draw([torch_generator(v, "t") for v in range(200)], one, SIZE)
    assert 999 <= found.min() and found.max() < 1000
    top = FlowObjective(timestep_sampling="uniform").at_level(10_000, 1, WHOLE, SIZE)
    assert top.item() == pytest.approx(1000) and top.item() < 1000


def test_a_range_without_any_of_the_density_is_refused() -> None:
    objective = FlowObjective(timestep_sampling="sigmoid", sigmoid_scale=0.1)
    with pytest.raises(UserError, match="--min_timestep 0 and --max_timestep 10: .* next to nothing"):
        objective.density(TimestepRange(0, 10), SIZE)


def test_validation_levels_divide_the_density_evenly() -> None:
    """They are the middles of four equal parts of a uniform density, as with DDPM, and of equal shares of others."""
    uniform = FlowObjective(timestep_sampling="uniform")
    levels = uniform.levels(WHOLE, 4)
    at = [uniform.at_level(level, 2, WHOLE, SIZE).tolist() for level in levels]
    assert at == [[125.0] * 2, [375.0] * 2, [625.0] * 2, [875.0] * 2]
    assert spread_timesteps(0, 1000, 4) == (125, 375, 625, 875)
    narrow = TimestepRange(200, 600)
    assert [uniform.at_level(level, 1, narrow, SIZE).item() for level in levels] == [250.0, 350.0, 450.0, 550.0]
    sigmoid = FlowObjective(timestep_sampling="sigmoid")
    found = [sigmoid.at_level(level, 1, WHOLE, SIZE).item() / 1000 for level in sigmoid.levels(WHOLE, 4)]
    assert [phi(logit(sigma)) for sigma in found] == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=1e-6)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown timestep sampling 'sigmod'"):
        density_of("sigmod")
