"""Published options that one family has, each through the command line: a run with it is another run, or the same.

What the options compute is compared in the families' own tests; here none may do nothing, and none of those that are
for memory and speed may change a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.fixtures.families import FAMILIES, Tiny
from tests.fixtures.runs import make_images, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_root_logger")]

Options = Mapping[str, object]
#: of every run: captions are encoded in each step, and the range of timesteps is whole
USUAL: dict[str, object] = {"max_train_steps": 3, "learning_rate": 1e-2, "network_dim": 2}


@dataclass(frozen=True)
class Case:
    """An option beside others that it acts on; ``others`` are those of the run that it is compared with.

    Attributes:
        largest: the largest difference of a weight from that of the other run; None for another run.
    """

    option: Options
    others: Options
    largest: float | None = None


def changes(option: Options, **others: object) -> Case:
    return Case(option, others)


def keeps(option: Options, *, within: float = 0.0, **others: object) -> Case:
    return Case(option, others, within)


WEIGHTING = {
    "sigma_sqrt": changes({"weighting_scheme": "sigma_sqrt"}),
    "cosmap": changes({"weighting_scheme": "cosmap"}),
    "logit_normal": changes({"weighting_scheme": "logit_normal"}),
    "logit_mean": changes({"logit_mean": 1.0}, weighting_scheme="logit_normal"),
    "logit_std": changes({"logit_std": 0.3}, weighting_scheme="logit_normal"),
    "mode": changes({"weighting_scheme": "mode"}),
    "mode_scale": changes({"mode_scale": -0.5}, weighting_scheme="mode"),
    "none": keeps({"weighting_scheme": "none"}),
}
CACHED = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}
#: other products of matrices for whole batches than for single captions
ROUNDING = 2e-4
EVERYWHERE = {
    "text_encoder_batch_size": keeps({"text_encoder_batch_size": 2}, within=ROUNDING, **CACHED),
    "disable_mmap": keeps({"disable_mmap_load_safetensors": True}),
    "cached text": keeps(CACHED, within=ROUNDING, network_train_unet_only=True),
    "blocks_to_swap": keeps({"blocks_to_swap": 0}),
}


def timesteps(*more: str, usual: str) -> dict[str, Case]:
    """The options of ``FlowOptions``; ``usual`` is the family's default density."""
    found = {name: changes({"timestep_sampling": name}) for name in ("sigma", "uniform", "sigmoid", "shift", *more)}
    del found[usual]
    return {
        **found,
        "sigmoid_scale": changes({"sigmoid_scale": 3.0}, timestep_sampling="sigmoid"),
        "sigmoid_scale of shift": changes({"sigmoid_scale": 3.0}, timestep_sampling="shift"),
        "flow shift of shift": changes({"discrete_flow_shift": 1.0}, timestep_sampling="shift"),
        "flow shift of sigma": changes({"discrete_flow_shift": 1.0}, timestep_sampling="sigma"),
        "additive": changes({"model_prediction_type": "additive"}),
        "sigma_scaled": changes({"model_prediction_type": "sigma_scaled"}),
    }


def of_sigma(cases: Mapping[str, Case]) -> dict[str, Case]:
    """The same where the density is that of the weighting scheme, which is not the family's default."""
    return {n: Case(c.option, {**c.others, "timestep_sampling": "sigma"}, c.largest) for n, c in cases.items()}


CASES: dict[str, dict[str, Case]] = {
    "sd3": {
        **WEIGHTING,
        **EVERYWHERE,
        "training_shift": changes({"training_shift": 3.0}),
        "t5xxl_max_token_length": changes({"t5xxl_max_token_length": 8}),
        "t5xxl_dtype": changes({"t5xxl_dtype": "bf16"}),
        "t5xxl_device": keeps({"t5xxl_device": "cpu"}),
        "apply_lg_attn_mask": changes({"apply_lg_attn_mask": True}),
        "apply_lg_attn_mask, cached": changes({"apply_lg_attn_mask": True}, **CACHED),
        "apply_t5_attn_mask": changes({"apply_t5_attn_mask": True}),
        "apply_t5_attn_mask, cached": changes({"apply_t5_attn_mask": True}, **CACHED),
        "clip_l_dropout_rate": changes({"clip_l_dropout_rate": 1.0}),
        "clip_g_dropout_rate": changes({"clip_g_dropout_rate": 1.0}),
        "t5_dropout_rate": changes({"t5_dropout_rate": 1.0}),
        "t5_dropout_rate, cached": changes({"t5_dropout_rate": 1.0}, **CACHED),
        "pos_emb_random_crop_rate": changes({"pos_emb_random_crop_rate": 1.0}),
        "enable_scaled_pos_embed": changes({"enable_scaled_pos_embed": True}),
    },
    "lumina": {
        **of_sigma(WEIGHTING),
        **EVERYWHERE,
        **timesteps("nextdit_shift", "flux_shift", usual="shift"),
        "gemma2_max_token_length": changes({"gemma2_max_token_length": 8}),
        "system_prompt": changes({"system_prompt": "You paint."}),
        "system_prompt, cached": changes({"system_prompt": "You paint."}, **CACHED),
    },
    "hunyuan_image": {
        **WEIGHTING,
        **EVERYWHERE,
        **timesteps("flux_shift", usual="sigma"),
        "fp8_scaled": changes({"fp8_scaled": True}, mixed_precision="bf16"),
        "fp8_vl": changes({"fp8_vl": True}),
        "text_encoder_cpu": keeps({"text_encoder_cpu": True}),
        "vae_chunk_size": keeps({"vae_chunk_size": 3}, within=ROUNDING),
        "attn_mode torch": keeps({"attn_mode": "torch"}),
        "attn_mode sdpa": keeps({"attn_mode": "sdpa"}),
        "split_attn": keeps({"split_attn": True}, within=ROUNDING),
    },
}


class Runs:
    """Runs of one family, each of them once."""

    def __init__(self, name: str, folder: Path) -> None:
        self._tiny = Tiny(FAMILIES[name], FAMILIES[name].make(folder / "model"))
        images = make_images(folder / "images", [(64, 64)] * 3 + [(96, 48)] * 2)
        self._dataset = write_dataset(folder / "data.toml", images, dataset="batch_size = 2")
        self._folder, self._done = folder, {}

    def __call__(self, options: Options) -> dict[str, Tensor]:
        key = repr(sorted(options.items()))
        if key not in self._done:
            output = self._folder / str(len(self._done))
            torch.set_num_threads(1)
            self._tiny.train(self._dataset, output, **{**USUAL, **options})
            self._done[key] = load_file(output / "tiny.safetensors")
        return self._done[key]


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, dict[str, Case]]:
    return Runs(request.param, tmp_path_factory.mktemp(request.param)), CASES[request.param]


def test_every_option_acts(runs: tuple[Runs, dict[str, Case]]) -> None:
    run, cases = runs
    wrong = []
    for name, case in cases.items():
        with_it, without = run({**case.others, **case.option}), run(case.others)
        assert with_it.keys() == without.keys(), name
        most = max(float((with_it[key] - tensor).abs().max()) for key, tensor in without.items())
        if most < 1e-6 if case.largest is None else most > case.largest:
            wrong.append(f"{name}: largest difference {most:g}")
    assert not wrong
