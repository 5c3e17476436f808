"""Everything around the optimizer of a run, in one place.

A step is ``start_step``, ``backward`` for each of its batches, ``step``, and ``end_step`` after the last change of the
weights. In it gradients are averaged over processes and clipped, weights are updated (in float32 or with stochastic
rounding, whole or sharded by ZeRO or FSDP, after or within the backward pass), the schedule advances, and the moving
average follows. The accelerator saves and loads states; this object registers what belongs to them.

Parameter groups are looked up in the optimizer whenever they are used: the accelerator and every loaded state replace
the dicts, so a kept reference would have an outdated learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.optim.ema import WeightAverage
from library.optim.fused_backward import FusedBackward, Part, check_fusible
from library.optim.gradient_exchange import GradientExchange
from library.optim.optimizers import OptimizerChoice
from library.optim.param_groups import lr_log_entries
from library.optim.pieces import Pieces
from library.optim.schedulers import ScheduleSettings, create_scheduler, follow_learning_rates
from library.optim.shards import LocalShards, SharedStates
from library.optim.states import keep_state_dtypes
from library.optim.stochastic_rounding import train_in_half
from library.optim.trial import changed_values, keeps_memory_format, updates_alone
from library.optim.two_weights import use_weights
from library.optim.zero import Zero, ZeroOptimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

#: 0-dim tensors on the device, by name; read when the device has computed them
Metrics = dict[str, Tensor]


class Watch(Protocol):
    """An observer of a step before and after its update, such as the guard against losses that are not finite."""

    def before_update(self, grad_norm: Tensor | None) -> bool:
        """Return whether the update is made; if not, weights and optimizer stay as they are."""
        ...

    def after_update(self) -> Metrics: ...


@dataclass(frozen=True)
class UpdateSettings:
    """The settings of a run's updates."""

    seed: int  # of the run, for rounding
    total_steps: int  # optimizer steps of the whole run, for the schedule
    max_grad_norm: float = 0.0  # norm of all gradients together; 0 for no limit
    ema_decay: float | None = None  # of the moving average, if there is one
    #: whether the device has memory for copies of the weights; if not, averages lie on the host, and ZeRO shares them
    keeps_copies: bool = True
    zero: Zero | None = None
    #: see ``library.optim.gradient_exchange``
    gradients_as_views: bool = False


class Update:
    """The optimizer of a run with everything around it.

    Args:
        choice: the chosen optimizer.
        groups: dicts with ``params``, on their device, and optionally ``lr``. The optimizer gets this process's shards
            of those that FSDP has sharded.
        schedule: of the learning rates.
        names: of the groups, for logs; ``None`` for a group without one.
        averaged: parameters of the moving average, by the names in its file.
        fused: parameters that are updated together within the backward pass; ``None`` for the usual step.
        fused_flag: the option that asks for ``fused``, for messages.
        before_update: called before the optimizer uses gradients.
        settle: waits until the host can read weights that are copied behind the work of the device.

    Raises:
        UserError: the optimizer cannot be used in this way.
        ValueError: ``fused`` or half precision with something that they exclude; the options' rules refuse this
        earlier.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        choice: OptimizerChoice,
        groups: Sequence[Mapping[str, Any]],
        schedule: ScheduleSettings,
        settings: UpdateSettings,
        *,
        names: Sequence[str | None] = (),
        averaged: Mapping[str, nn.Parameter] | None = None,
        fused: Sequence[Part] | None = None,
        fused_flag: str = "--fused_backward_pass",
        before_update: Callable[[], None] | None = None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        self.settle = settle or (lambda: None)
        self._accelerator, self._choice, self._settings, self._names = accelerator, choice, settings, names
        #: the trained parameters of the model, which may be sharded
        self.trained: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.shards = shards = LocalShards(self.trained, accelerator.device)
        optimizer = choice.create([{**g, "params": [shards.local(p) for p in g["params"]]} for g in groups])
        #: the optimizer's parameters, of which shards are plain tensors
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters)
        if settings.zero is not None and (half or fused is not None):
            raise ValueError("ZeRO shards whole updates of float32 weights")
        if fused is not None and (settings.max_grad_norm > 0 or accelerator.num_processes > 1 or accelerator.scaler):
            raise ValueError("a fused update never sees all gradients: it cannot clip, average or scale them")
        alone = (half or fused is not None) and updates_alone(choice, self.parameters[0].device)
        self._settle_memory_formats(choice)
        keep_state_dtypes(optimizer, None if shards.on_host else accelerator.device)
        if half:
            own = {p: accelerator.process_index for p in self.parameters if p in shards}
            train_in_half(optimizer, settings.seed, alone=alone, ranks=own)
        if settings.zero is not None:
            optimizer = ZeroOptimizer(optimizer, settings.zero, accelerator.device, keeps_copies=settings.keeps_copies)
        if before_update is not None:
            optimizer.register_step_pre_hook(lambda *_: before_update())
        self._fused: FusedBackward | None = None
        if fused is not None:
            check_fusible(choice.name, alone, fused_flag)
            self._pieces = Pieces(optimizer)
            self._fused = FusedBackward(self._pieces, fused)
        self._prepared = accelerator.prepare_optimizer(optimizer)
        self._states = SharedStates(optimizer, shards) if shards else None
        self._schedule = accelerator.prepare_scheduler(
            create_scheduler(optimizer, choice, schedule, total_steps=settings.total_steps)
        )
        # base learning rates of this run's options
        self._learning_rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        # FSDP has averaged those of shards
        exchanged = [p for p in self.parameters if p not in shards]
        self._exchange = GradientExchange(accelerator, exchanged, as_views=settings.gradients_as_views)
        self.average: WeightAverage | None = None
        if settings.ema_decay is not None:
            averaged = {name: shards.local(p) for name, p in (averaged or {}).items()}
            self.average = WeightAverage(averaged, settings.ema_decay, on_host=not settings.keeps_copies)
            self.average.keep_with_states(accelerator, shards)
        self._batches = self._batches_left = 1

    def _settle_memory_formats(self, choice: OptimizerChoice) -> None:
        """Let weights have from the start the memory format that they will have after a step.

        Convolutions compute other last bits in another one, and a resumed run starts anew.
        """
        # asked by strides, as a 1x1 convolution is contiguous in both formats
        others = [p for p in self.parameters if p.stride() != torch.empty(p.shape, device="meta").stride()]
        # DeepSpeed lays all weights in a row
        if others and (self._settings.zero is not None or not keeps_memory_format(choice, others[0].device)):
            for parameter in others:
                parameter.data = parameter.data.contiguous().view(-1).view(parameter.shape)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer inside accelerate's wrapper; its groups and states are those of whole parameters."""
        return self._prepared.optimizer

    # ---- a step ----

    def start_step(self, batches: int = 1) -> None:
        """Begin a step of so many batches."""
        self._batches = self._batches_left = batches
        self._exchange.start()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a batch, whose mean over the batches of the step is the step's gradient.

        Args:
            loss: of the batch, with a graph.
        """
        self._batches_left -= 1
        if self._fused is not None:
            self._fused.before_backward(is_last=self._batches_left == 0)
        self._accelerator.backward(loss / self._batches)

    def step(self, watch: Watch | None = None) -> Metrics:
        """Update the weights; return the norm of the gradients, if it is limited, and the findings of ``watch``."""
        metrics: Metrics = {}
        self.shards.take_gradients()
        self._exchange.average()
        if self.shards and self._accelerator.scaler is not None:
            self.shards.share_infinity(self.parameters)
        if self._settings.max_grad_norm > 0:
            metrics["grad_norm"] = self._clip(self._settings.max_grad_norm)
        if watch is None or watch.before_update(metrics.get("grad_norm")):
            if self._fused is None:
                self._prepared.step()
            else:
                self._pieces.end_step()
        if watch is not None:
            metrics |= watch.after_update()
        if not self._prepared.step_was_skipped:
            self._schedule.step()
        self._prepared.zero_grad(set_to_none=True)
        return metrics

    def _clip(self, limit: float) -> Tensor:
        """Limit the norm of all gradients together; return what it was."""
        if not self.shards:
            return self._accelerator.clip_grad_norm_(self.parameters, limit)
        self._accelerator.unscale_gradients()
        norm = self.shards.norm(self.parameters)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def end_step(self, step: int) -> None:
        """Finish ``step``, counted from 1, after all changes of the weights."""
        if self.average is not None:
            self.settle()
            self.average.update(step)

    # ---- between steps ----

    def write_states(self, path: Path) -> None:
        """Write the optimizer's states, where they are sharded, over the file without them that accelerate writes.

        Every process must call it.
        """
        if self._states is not None:
            self._states.write(path)

    def training_mode(self, training: bool) -> None:
        """Switch optimizers that keep two sets of weights to those for training, or for use."""
        use_weights(self.optimizer, for_training=training)

    def follow_options(self, before: OptimizerChoice) -> None:
        """Apply learning rates and arguments of this run's options after a state was loaded.

        Args:
            before: the choice that the state was saved with.

        Raises:
            UserError: the schedule does not allow another learning rate.
        """
        for group in self.optimizer.param_groups:
            group.update(copy.deepcopy(changed_values(before, self._choice)))
        if not self._choice.uses_relative_step:
            follow_learning_rates(self._schedule.scheduler, self._learning_rates)

    def learning_rates(self) -> dict[str, float]:
        """Return the trackers' ``lr/...`` entries."""
        return lr_log_entries(self.optimizer, self._choice, self._names)
