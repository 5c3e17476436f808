"""An exponential moving average of the trained parameters (``--ema_decay``), saved beside the weights.

After step t each average a becomes d a + (1 - d) p. The decay d warms up as min(D, (1 + t) / (10 + t)), so that the
random start has little weight: TensorFlow's ``ExponentialMovingAverage`` with ``num_updates`` introduced it, and it is
common in diffusion training. It depends on the step only, so a resumed run needs only the averages.

Averages are float32 whatever the parameters are, and no update waits for the device. They are on the parameters'
device, or in host memory, to which weights are copied behind the step's own work and averaged one step later.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.files.gathering import whole
from library.files.safetensors_io import iterate_tensors
from library.files.streamed import tensor_info, write_streamed
from library.optim.flat import HostCopies
from library.optim.shards import LocalShards

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

#: in the state folder
STATE_FILE = "ema.safetensors"


class WeightAverage:
    """Averages of named parameters, which start as the parameters are.

    Args:
        decay: D, above 0 and below 1; 0.999 averages over about the last 1000 steps.
        on_host: keep the averages in host memory.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, on_host: bool = False) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self._copies = HostCopies(list(self._parameters.values())) if on_host else None
        self._due: int | None = None  # the step whose weights are being copied to the host
        self._averages: dict[str, Tensor] | None = self._present()

    def restart(self) -> None:
        """Restart with the present parameters."""
        self._due = None
        self._averages = self._present()

    def _current(self) -> dict[str, Tensor]:
        """Return the averages, which start with the parameters after a state without averages."""
        if self._averages is None:
            self.restart()
        assert self._averages is not None
        return self._averages

    def _present(self) -> dict[str, Tensor]:
        return {name: self._wide(p.detach()) for name, p in self._parameters.items()}

    def _wide(self, tensor: Tensor) -> Tensor:
        """Return a float32 copy on the device of the averages."""
        return tensor.to(device="cpu" if self._copies is not None else tensor.device, dtype=torch.float32, copy=True)

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after ``step``, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the parameters after ``step``, counted from 1."""
        averages = self._current()
        if self._copies is not None:
            self._take_in_due()
            self._copies.start()
            self._due = step
            return
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(averages.values()), current, 1.0 - self.decay_at(step))

    @torch.no_grad()
    def _take_in_due(self) -> None:
        """Average the weights that ``update`` sent to the host."""
        if self._due is None or self._copies is None:
            return
        for average, current in zip(self._current().values(), self._copies.arrived(), strict=True):
            average.lerp_(current.float(), 1.0 - self.decay_at(self._due))
        self._due = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by the averages within the context; afterwards they are bit for bit as before."""
        averages = self.state_dict()
        # on the host: there may be no memory for a second copy beside the parameters
        kept = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        self._write(averages)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    # ---- states ----

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the parameters' names, float32."""
        averages = self._current()
        self._take_in_due()
        return dict(averages)

    def load_state_dict(self, state: Mapping[str, Tensor], source: str = "the state") -> None:
        """Load averages.

        Raises:
            UserError: they are not those of these parameters.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise UserError(
                f"{source}: its averages are of other parameters; resume with the network options of that run"
            )
        self._due = None
        self._averages = {
            name: self._wide(state[name].to("cpu" if self._copies is not None else p.device))
            for name, p in self._parameters.items()
        }

    def keep_with_states(self, accelerator: Accelerator, shards: LocalShards) -> None:
        """Save the averages in the accelerator's state folders, whole, and load them with a state."""

        def save(models: Any, weights: Any, folder: str) -> None:
            averages, of = self.state_dict(), self._parameters
            infos = {name: tensor_info(t.dtype, shards.whole_shape(of[name])) for name, t in averages.items()}

            def write() -> None:
                write_streamed(Path(folder) / STATE_FILE, infos, lambda name: whole(averages[name]))

            if shards:
                shards.write_together(write, [(of[name], t) for name, t in averages.items()])
            elif accelerator.is_main_process:
                write()

        def load(models: Any, folder: str) -> None:
            file = Path(folder) / STATE_FILE
            if file.exists():
                of = self._parameters
                parts = {n: shards.part_of(of[n], t) if n in of else t for n, t in iterate_tensors(file)}
                self.load_state_dict(parts, str(file))
            else:
                # the weights are loaded after this, so the averages start at the first step
                self._averages = self._due = None
                logger.warning("--ema_decay: %s holds no averages; they start with its weights", folder)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
