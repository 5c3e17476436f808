"""docs/flow_matching.md is true: its table of densities, its numbers, and the options it names."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pytest
import torch

from library.config.arguments import flat, with_groups
from library.config.flow import DDPM_ONLY
from library.diffusion.flow import resolution_shift
from library.diffusion.objective import FlowObjective, LossSettings, TimestepRange
from library.diffusion.weighting import flow_weight
from library.inference.prompt_line import TRAINING_OPTIONS, family_options
from library.training.kinds.adapter_options import TrainNetworkOptions
from tests.fixtures.flow_train_network import ToyFlow

PAGE = (Path(__file__).parents[2] / "docs" / "flow_matching.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(--timestep_sampling [^`]*)`(?:, (\d+) pixels)? \| (\d+) \| (\d+) \| (\d+) \|", PAGE, re.M)
#: fields of the objective by option
NAMES = {"discrete_flow_shift": "shift"}


def test_the_table_has_every_density() -> None:
    assert len(ROWS) == 10
    samplings = {options.split()[1] for options, *_ in ROWS}
    assert samplings == {"uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift", "sigma"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:2]))
def test_quarters_of_the_table(row: tuple[str, ...]) -> None:
    words, pixels, *quarters = row
    options: dict[str, object] = {}
    for name, value in re.findall(r"--(\w+) (\S+)", words):
        options[NAMES.get(name, name)] = float(value) if value[0].isdigit() else value
    side = int(pixels or 1024) // 8
    density = FlowObjective(**options).density(TimestepRange(), (side, side))
    assert [round(1000 * density.quantile(share)) for share in (0.25, 0.5, 0.75)] == [int(q) for q in quarters]


def test_numbers_in_the_text() -> None:
    assert round(math.exp(1.15), 4) == 3.1582
    # tokens of 16 x 16 pixels
    assert (256 // 16) ** 2 == 256 and (1024 // 16) ** 2 == 4096
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
    # a mean above 0 is for less noise
    less = FlowObjective(weighting_scheme="logit_normal", logit_mean=1.0).density(TimestepRange(), (8, 8))
    assert less.quantile(0.5) < 0.5
    # sigma_scaled with sigma_sqrt is raw: (sigma e)^2 / sigma^2
    sigmas = torch.tensor([0.01, 0.3, 1.0])
    torch.testing.assert_close(flow_weight(sigmas, "sigma_sqrt") * sigmas**2, torch.ones(3))
    # (1 - c) (1 - sigma)^2 + c, and c^sigma
    timesteps, objective = 1000 * sigmas, FlowObjective()
    snr = objective.huber_threshold(timesteps, LossSettings(huber_schedule="snr", huber_c=0.2))
    torch.testing.assert_close(snr, 0.8 * (1 - sigmas) ** 2 + 0.2)
    exponential = objective.huber_threshold(timesteps, LossSettings(huber_schedule="exponential", huber_c=0.2))
    torch.testing.assert_close(exponential, 0.2**sigmas)


def test_options_on_the_page_exist() -> None:
    kind = with_groups(TrainNetworkOptions, ToyFlow.declaration.groups)
    known = {field.name for field, _ in flat(kind.from_args(argparse.Namespace()))}
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", PAGE))
    assert named - known <= {option.name for option in (*TRAINING_OPTIONS, *family_options())}
    assert set(DDPM_ONLY) <= named
    own = {name for group in ("weighting", "flow") for name in vars(ToyFlow.declaration.groups[group]()).keys()}
    assert own <= named
