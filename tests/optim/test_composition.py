"""The pieces of an update, in pairs: each pair equals the plain run under a warm-up schedule, or is refused.

The plain run is written out in torch: AdamW, a schedule, a moving average, and nothing around them.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from library.architectures.sd import SD
from library.config.rules import check
from library.errors import UserError
from library.optim.fused_backward import one_by_one
from library.optim.optimizers import resolve_optimizer
from library.optim.schedulers import ScheduleSettings
from library.optim.stochastic_rounding import round_stochastically
from library.optim.update import Update, UpdateSettings
from library.optim.zero import Zero
from library.randomness import key
from library.training.kinds.adapter_options import TrainNetworkOptions

STEPS, WARMUP, RATES, SEED, DECAY = 8, 5, (1e-2, 3e-3), 3, 0.9
RESUMED_AFTER = 3

FEATURES = ("fused", "half", "zero", "ema", "resume", "wrapper")
#: pairs that cannot be had, and the options that a rule refuses for it
REFUSED = {
    ("fused", "zero"): {"fused_backward_pass": True, "max_grad_norm": 0.0, "deepspeed": True},
    ("half", "zero"): {"full_bf16": True, "mixed_precision": "bf16", "deepspeed": True},
}
PAIRS = list(combinations(FEATURES, 2))

Weights = list[Tensor]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)
        self.to(dtype)

    def loss(self, step: int, batch: int = 0) -> Tensor:
        dtype = self.first.weight.dtype
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * batch + step)).to(dtype)
        return self.second(self.first(x).tanh()).float().square().mean()

    @property
    def groups(self) -> list[dict[str, object]]:
        return [
            {"params": list(module.parameters()), "lr": rate}
            for module, rate in zip((self.first, self.second), RATES, strict=True)
        ]


def plain_run(*, half: bool, batches: int = 1) -> tuple[Weights, Weights]:
    """Weights and their averages after all steps; in half precision each step is one of float32, rounded."""
    model = Model(torch.bfloat16 if half else torch.float32)
    parameters = list(model.parameters())
    states = [(torch.zeros(p.shape), torch.zeros(p.shape)) for p in parameters]
    averages = [p.detach().float() for p in parameters]
    for step in range(1, STEPS + 1):
        for batch in range(batches):
            (model.loss(step, batch) / batches).backward()
        warmup = min(1.0, (step - 1) / WARMUP)
        for place, (p, rate) in enumerate(zip(parameters, (RATES[0], RATES[0], RATES[1]), strict=True)):
            # a fresh AdamW over float32 copies; its momenta are kept in the parameter's precision
            wide = nn.Parameter(p.detach().float())
            wide.grad = p.grad.float()
            optimizer = torch.optim.AdamW([wide], lr=rate * warmup, fused=not half)
            if step > 1:
                momenta = {"exp_avg": states[place][0].clone(), "exp_avg_sq": states[place][1].clone()}
                optimizer.state[wide] = {"step": torch.tensor(float(step - 1)), **momenta}
            optimizer.step()
            state = optimizer.state[wide]
            kept = [state["exp_avg"], state["exp_avg_sq"]]
            value = wide.detach()
            if half:
                draws = torch.Generator().manual_seed(key(SEED, "rounding", step - 1, place))
                value, *kept = (round_stochastically(t, torch.bfloat16, draws).float() for t in (value, *kept))
            states[place] = (kept[0], kept[1])
            p.data = value.to(p.dtype)
            p.grad = None
        decay = min(DECAY, (1 + step) / (10 + step))
        averages = [a.lerp(p.detach().float(), 1 - decay) for a, p in zip(averages, parameters, strict=True)]
    return [p.detach() for p in parameters], averages


def update_of(model: Model, accelerator: Accelerator, features: tuple[str, ...]) -> Update:
    choice = resolve_optimizer("AdamW", False, False, None, RATES[0])
    return Update(
        accelerator,
        choice,
        model.groups,
        ScheduleSettings("constant_with_warmup", warmup=WARMUP),
        UpdateSettings(
            seed=SEED,
            total_steps=STEPS,
            ema_decay=DECAY if "ema" in features else None,
            zero=Zero(1) if "zero" in features else None,
        ),
        averaged=dict(model.named_parameters()),
        fused=one_by_one(list(model.parameters())) if "fused" in features else None,
    )


def run_with(features: tuple[str, ...], folder: Path, *, batches: int = 1) -> tuple[Weights, Weights | None]:
    """The same with ``Update``: saved, made anew and loaded in the middle, if that is one of the features."""
    dtype = torch.bfloat16 if "half" in features else torch.float32

    def begin() -> tuple[Accelerator, Model, Update]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare_model(Model(dtype), evaluation_mode=True)
        return accelerator, model, update_of(model, accelerator, features)

    accelerator, model, update = begin()
    for step in range(1, STEPS + 1):
        if step == RESUMED_AFTER + 1 and "resume" in features:
            accelerator.save_state(str(folder), safe_serialization=True)
            accelerator, model, update = begin()
            accelerator.load_state(str(folder))
        if "wrapper" in features and "resume" not in features:
            # what accelerate's wrapper does when it is made, and what replaces every group's dict
            update.optimizer.load_state_dict(update.optimizer.state_dict())
        update.start_step(batches)
        for batch in range(batches):
            update.backward(model.loss(step, batch))
        update.step()
        assert all(p.grad is None for p in model.parameters())
        update.end_step(step)
    AcceleratorState._reset_state(reset_partial_state=True)
    averages = list(update.average.state_dict().values()) if update.average is not None else None
    return [p.detach() for p in model.parameters()], averages


def assert_is_plain(features: tuple[str, ...], folder: Path, *, batches: int = 1) -> None:
    weights, averages = plain_run(half="half" in features, batches=batches)
    found, found_averages = run_with(features, folder, batches=batches)
    exact = "zero" not in features  # which updates pieces of all weights in a row
    for one, other in zip(found, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if exact else 1e-6)
    for one, other in zip(found_averages or averages, averages, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert (found_averages is not None) is ("ema" in features)
    moved = max(
        float((a - b.detach()).abs().max()) for a, b in zip(found, Model(found[0].dtype).parameters(), strict=True)
    )
    assert moved > 5e-3, "far more than any difference that is allowed"


@pytest.mark.parametrize("pair", [p for p in PAIRS if "zero" not in p], ids="-".join)
def test_a_pair_is_the_plain_run(pair: tuple[str, str], tmp_path: Path) -> None:
    assert_is_plain(pair, tmp_path)


@pytest.mark.parametrize("half", [False, True])
def test_all_at_once_with_accumulation(half: bool, tmp_path: Path) -> None:
    """A fused update waits for the last batch of a step, so accumulation gives the same as without it."""
    features = ("fused", "ema", "resume", "wrapper", *(["half"] if half else []))
    assert_is_plain(features, tmp_path, batches=2)


def _zero_pairs(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    for number, pair in enumerate(p for p in PAIRS if "zero" in p and p not in REFUSED):
        assert_is_plain(pair, Path(folder) / str(number))


def test_pairs_with_zero_are_the_plain_run(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    # in its own process, as DeepSpeed joins the processes of a run for good
    torch.multiprocessing.spawn(_zero_pairs, args=(str(tmp_path),), nprocs=1)


@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_pairs_that_cannot_be_had_are_refused(pair: tuple[str, str]) -> None:
    good = {
        "pretrained_model_name_or_path": "model.safetensors",
        "dataset_config": "data.toml",
        "output_dir": "out",
        "network_module": "networks.lora",
    }
    options = TrainNetworkOptions.from_args(argparse.Namespace(**good, **REFUSED[pair]))
    with pytest.raises(UserError, match="not with DeepSpeed"):
        check(options, SD)
