"""The training objective and its sampling: noise prediction and v-prediction (DDPM), or flow matching.

An architecture supplies its ``Objective``; training, validation and sampling use it and know neither kind.
Shape legend: B batch, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from library.diffusion import flow, weighting
from library.diffusion import loss as losses
from library.diffusion import timesteps as times
from library.diffusion.ddpm import NoiseSchedule, add_noise, velocity
from library.diffusion.samplers import check_sampler, create_scheduler_for, set_timesteps


@dataclass(frozen=True)
class LossSettings:
    """The settings of comparing prediction and target; see ``library.diffusion.loss`` and ``weighting``."""

    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    scale_v_pred_like_noise_pred: bool = False
    v_pred_like_weight: float | None = None
    debiased: bool = False


@dataclass(frozen=True)
class TimestepRange:
    """``--min_timestep`` to, but not including, ``--max_timestep``."""

    low: int = 0
    high: int = 1000


class Objective(ABC):
    """The objective. Its timesteps are the model's input: (B,) int64 from 0 to 999 with DDPM, float32 from 0 to 1000
    with flow."""

    # ---- training ----

    def check(self, within: TimestepRange) -> None:
        """Check before anything is loaded whether timesteps can be drawn.

        Raises:
            UserError: hardly one lies within the range.
        """

    @abstractmethod
    def draw(self, generators: Sequence[torch.Generator], within: TimestepRange, size: tuple[int, int]) -> Tensor:
        """Draw a timestep for each sample (B,), on the CPU.

        Args:
            generators: one for each sample.
            size: (h, w) of the latents, the same for a whole batch.
        """

    @abstractmethod
    def levels(self, within: TimestepRange, count: int) -> tuple[int, ...]:
        """Return the numbers of the fixed timesteps of validation, which divide the distribution evenly."""

    @abstractmethod
    def at_level(self, level: int, count: int, within: TimestepRange, size: tuple[int, int]) -> Tensor:
        """Return the timestep of one of ``levels``, (count,) on the CPU."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The model's input (B, C, h, w)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the value (B, C, h, w) that ``comparable`` of the model's output should have."""

    def comparable(self, output: Tensor, timesteps: Tensor) -> Tensor:
        """The model's output (B, C, h, w), float32, as it is compared with the target."""
        return output

    @abstractmethod
    def huber_threshold(self, timesteps: Tensor, settings: LossSettings) -> Tensor:
        """(B,) float32."""

    @abstractmethod
    def weighted(self, loss: Tensor, timesteps: Tensor, settings: LossSettings) -> Tensor:
        """Losses (B,) times their weights by timestep."""

    def to(self, device: torch.device | str) -> Objective:
        return self

    # ---- sampling ----

    @abstractmethod
    def sampler(self, named: str | None, default: str) -> str:
        """The sampler to draw with.

        Args:
            named: by the prompt itself.
            default: of ``--sample_sampler``.

        Raises:
            UserError: it cannot work with this objective.
        """

    @abstractmethod
    def scheduler(self, sampler: str, steps: int, size: tuple[int, int], device: torch.device) -> Any:
        """A scheduler in diffusers' form with its timesteps set, for latents of this (h, w).

        Raises:
            UserError: as ``sampler``.
        """

    def for_sampler(self, output: Tensor, timesteps: Tensor) -> Tensor:
        """The model's output (B, C, h, w) as the scheduler takes it."""
        return output


@dataclass(frozen=True)
class DdpmObjective(Objective):
    """The discrete diffusion of Stable Diffusion 1.x, 2.x and XL.

    Attributes:
        schedule: of training.
        v_prediction: the model predicts v, not the noise.
        zero_terminal_snr: whether ``schedule`` ends in pure noise.
    """

    schedule: NoiseSchedule
    v_prediction: bool = False
    zero_terminal_snr: bool = False

    def draw(self, generators: Sequence[torch.Generator], within: TimestepRange, size: tuple[int, int]) -> Tensor:
        drawn = [times.sample_timestep(generator, within.low, within.high) for generator in generators]
        return torch.tensor(drawn, dtype=torch.long)

    def levels(self, within: TimestepRange, count: int) -> tuple[int, ...]:
        return times.spread_timesteps(within.low, within.high, count)

    def at_level(self, level: int, count: int, within: TimestepRange, size: tuple[int, int]) -> Tensor:
        return torch.tensor([level] * count, dtype=torch.long)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return add_noise(self.schedule, latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return velocity(self.schedule, latents, noise, timesteps) if self.v_prediction else noise

    def huber_threshold(self, timesteps: Tensor, settings: LossSettings) -> Tensor:
        return losses.huber_threshold(
            timesteps, self.schedule, settings.huber_schedule, settings.huber_c, settings.huber_scale
        )

    def weighted(self, loss: Tensor, timesteps: Tensor, settings: LossSettings) -> Tensor:
        if settings.min_snr_gamma:
            loss = loss * weighting.min_snr_weight(timesteps, self.schedule, settings.min_snr_gamma, self.v_prediction)
        if settings.scale_v_pred_like_noise_pred:
            loss = loss * weighting.scale_v_pred_like_noise(timesteps, self.schedule)
        if settings.v_pred_like_weight:
            loss = loss * weighting.v_pred_like_weight(timesteps, self.schedule, settings.v_pred_like_weight)
        if settings.debiased:
            loss = loss * weighting.debiased_weight(timesteps, self.schedule, self.v_prediction)
        return loss

    def to(self, device: torch.device | str) -> DdpmObjective:
        return replace(self, schedule=self.schedule.to(device))

    # ---- sampling ----

    def sampler(self, named: str | None, default: str) -> str:
        chosen = named or default
        check_sampler(chosen, v_prediction=self.v_prediction, zero_terminal_snr=self._samples_with_zero_snr)
        return chosen

    def scheduler(self, sampler: str, steps: int, size: tuple[int, int], device: torch.device) -> Any:
        made = create_scheduler_for(
            sampler, v_prediction=self.v_prediction, zero_terminal_snr=self._samples_with_zero_snr
        )
        set_timesteps(made, steps, device)
        return made

    @property
    def _samples_with_zero_snr(self) -> bool:
        """Whether samplers begin with pure noise, which a model that predicts noise cannot; training only warns."""
        return self.zero_terminal_snr and self.v_prediction


#: samplers of flow matching
FLOW_SAMPLERS = ("euler",)
#: fixed levels are numbered by the share of the density below them, in these parts
_LEVEL_PARTS = 10_000


@dataclass(frozen=True)
class FlowObjective(Objective):
    """Rectified flow; the options are those of ``density_of``, ``flow_weight`` and ``training_target``.

    Attributes:
        shift: ``--discrete_flow_shift``, of training.
        cells_per_token: latent cells that are one token of the image, for the shifts by resolution.
        sampling_shift: of generation; None: by resolution.
        sampling_end: the least noise level of generation, before it is shifted twice; see ``flow.sampling_sigmas``.
    """

    timestep_sampling: str = "sigma"
    weighting_scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    prediction_type: str = "raw"
    cells_per_token: int = 4
    sampling_shift: float | None = None
    sampling_end: float | None = None

    def check(self, within: TimestepRange) -> None:
        # an image of 512 pixels; shifts by resolution are much the same for all
        self.density(within, (64, 64))

    def density(self, within: TimestepRange, size: tuple[int, int]) -> times.Density:
        """Return the density of the noise levels sigma at which images with latents of this (h, w) are trained.

        Raises:
            UserError: next to nothing of it lies within the range.
        """
        return _density(self, within, size)

    def draw(self, generators: Sequence[torch.Generator], within: TimestepRange, size: tuple[int, int]) -> Tensor:
        density = self.density(within, size)
        return _timesteps([density.quantile(times.sample_share(generator)) for generator in generators], within)

    def levels(self, within: TimestepRange, count: int) -> tuple[int, ...]:
        return times.spread_timesteps(0, _LEVEL_PARTS, count)

    def at_level(self, level: int, count: int, within: TimestepRange, size: tuple[int, int]) -> Tensor:
        return _timesteps([self.density(within, size).quantile(level / _LEVEL_PARTS)] * count, within)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return flow.interpolate(latents, noise, timesteps / flow.TIMESTEPS)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return flow.training_target(latents, noise, timesteps / flow.TIMESTEPS, self.prediction_type)

    def comparable(self, output: Tensor, timesteps: Tensor) -> Tensor:
        return flow.comparable(output, timesteps / flow.TIMESTEPS, self.prediction_type)

    def huber_threshold(self, timesteps: Tensor, settings: LossSettings) -> Tensor:
        return losses.flow_huber_threshold(timesteps, settings.huber_schedule, settings.huber_c, settings.huber_scale)

    def weighted(self, loss: Tensor, timesteps: Tensor, settings: LossSettings) -> Tensor:
        return loss * weighting.flow_weight(timesteps / flow.TIMESTEPS, self.weighting_scheme)

    # ---- sampling ----

    def sampler(self, named: str | None, default: str) -> str:
        return FLOW_SAMPLERS[0]

    def scheduler(self, sampler: str, steps: int, size: tuple[int, int], device: torch.device) -> Any:
        shift = self.sampling_shift if self.sampling_shift is not None else self._resolution_shift(size)
        return flow.FlowEuler(steps, shift, device, end=self.sampling_end)

    def for_sampler(self, output: Tensor, timesteps: Tensor) -> Tensor:
        return flow.velocity_of_output(output, timesteps / flow.TIMESTEPS, self.prediction_type)

    def _resolution_shift(self, size: tuple[int, int]) -> float:
        return flow.resolution_shift(size[0] * size[1] / self.cells_per_token)


@lru_cache(maxsize=64)
def _density(objective: FlowObjective, within: TimestepRange, size: tuple[int, int]) -> times.Density:
    """Return the density, which is made once for each size of a run's images."""
    density = times.density_of(
        objective.timestep_sampling,
        weighting_scheme=objective.weighting_scheme,
        logit_mean=objective.logit_mean,
        logit_std=objective.logit_std,
        mode_scale=objective.mode_scale,
        sigmoid_scale=objective.sigmoid_scale,
        shift=objective.shift,
        size_shift=objective._resolution_shift(size),
    )
    return times.Truncated(density, within.low / flow.TIMESTEPS, within.high / flow.TIMESTEPS)


def _timesteps(sigmas: Sequence[float], within: TimestepRange) -> Tensor:
    """(B,) float32; below the end of the range also where rounding would reach it."""
    timesteps = (torch.tensor(sigmas, dtype=torch.float64) * flow.TIMESTEPS).float()
    below = torch.nextafter(torch.tensor(float(within.high)), torch.tensor(0.0)).item()
    return timesteps.clamp(min=float(within.low), max=below)
