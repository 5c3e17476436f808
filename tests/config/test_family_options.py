"""Options that only one family has: in the parser, the file, the explanation, the pages, rules and warnings."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from library.architectures.sd import SD
from library.config.arguments import flat, with_groups
from library.config.config_file import read_args
from library.config.declaration import Declaration
from library.config.document import is_number, pages, scripts, unit_of
from library.config.explain import explanation
from library.config.flow import DDPM_ONLY, FlowOptions, WeightingOptions
from library.config.no_effect import reasons
from library.config.rules import check
from library.errors import UserError
from library.training.cache_tool_options import CacheToolOptions
from library.training.fingerprint import content_of, option_values
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.kinds.full_options import TrainFullOptions
from tests.fixtures.flow_train_network import ToyFlow, ToyNetworkTrainer, ToyOptions, setup_parser

CLI = Path(__file__).parents[1] / "compat" / "data" / "cli"
TOY = ToyFlow()
KIND = with_groups(TrainNetworkOptions, TOY.declaration.groups)


def options(**given: object) -> TrainNetworkOptions:
    return KIND.from_args(argparse.Namespace(**given))


# ---- joining ----


def test_own_groups_stand_after_the_model() -> None:
    assert list(KIND.groups())[:5] == ["model", "toy", "weighting", "flow", "dataset"]
    assert KIND is ToyNetworkTrainer.joined_options() is with_groups(TrainNetworkOptions, dict(TOY.declaration.groups))
    assert issubclass(KIND, TrainNetworkOptions)
    found = options(guidance_scale=1.0, network_dim=4)
    assert (found.toy.guidance_scale, found.flow.discrete_flow_shift, found.network.network_dim) == (1.0, 3.0, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.toy = None
    # families without own groups have the very class
    assert with_groups(TrainNetworkOptions, SD.declaration.groups) is TrainNetworkOptions
    assert SD.configured(TrainNetworkOptions.from_args(argparse.Namespace())) is SD


def test_the_parser_and_the_configuration_file_know_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[toy]\nguidance_scale = 2.5\n[flow]\ntimestep_sampling = 'flux_shift'\n")
    args = read_args(setup_parser(), ["--config_file", str(file), "--sigmoid_scale", "2"])
    found = KIND.from_args(args)
    assert (found.toy.guidance_scale, found.flow.timestep_sampling, found.flow.sigmoid_scale) == (2.5, "flux_shift", 2)
    rows = {row.name: row for row in explanation(found, args.origins, TOY.declaration)}
    assert (rows["guidance_scale"].group, rows["guidance_scale"].origin) == ("Toy model", f"{file}:2")
    assert (rows["timestep_sampling"].group, rows["sigmoid_scale"].origin) == ("Flow matching", "command line")
    file.write_text("guidence_scale = 2.5\ntimestep_sampling = 'flux_shft'\n")
    with pytest.raises(SystemExit):
        read_args(setup_parser(), ["--config_file", str(file)])
    error = capsys.readouterr().err
    assert 'guidence_scale: unknown option (did you mean "guidance_scale"?)' in error
    assert (
        "'flux_shft' is not one of: sigma, uniform, sigmoid, shift, flux_shift (did you mean \"flux_shift\"?)" in error
    )
    with pytest.raises(SystemExit):
        read_args(setup_parser(), ["--discrete_flow_shft", "3"])
    assert 'did you mean "--discrete_flow_shift"' in capsys.readouterr().err


def test_the_shared_flags_are_the_published_ones() -> None:
    published = {o["dest"]: o for o in json.loads((CLI / "tools__cache_latents.json").read_text())["options"]}
    parser = setup_parser()
    actions = {action.dest: action for action in parser._actions}
    for kind in (WeightingOptions, FlowOptions):
        for field in dataclasses.fields(kind):
            action, option = actions[field.name], published[field.name]
            assert (action.default, action.nargs) == (option["default"], option["nargs"])
            assert (list(action.choices) if action.choices else None) == option["choices"]


# ---- the configured family ----


def test_a_configured_family_has_the_values_and_nothing_else_changes() -> None:
    given = options(guidance_scale=1.5, timestep_sampling="shift", discrete_flow_shift=2.0)
    found = TOY.configured(given)
    assert found is not TOY and isinstance(found, ToyFlow)
    assert TOY.chosen(ToyOptions).guidance_scale == 3.5
    assert found.chosen(ToyOptions) == given.toy
    objective = found.objective(v_prediction=False, zero_terminal_snr=False)
    assert (objective.timestep_sampling, objective.shift, objective.prediction_type) == ("shift", 2.0, "sigma_scaled")
    assert found.changed(ToyOptions, guidance_scale=9.0).chosen(ToyOptions).guidance_scale == 9.0
    assert found.chosen(ToyOptions).guidance_scale == 1.5
    assert found.changed(ToyOptions, guidance_scale=9.0).chosen(FlowOptions).timestep_sampling == "shift"
    # loader workers get a copy
    assert pickle.loads(pickle.dumps(found)).chosen(ToyOptions) == copy.copy(found).chosen(ToyOptions) == given.toy
    with pytest.raises(LookupError, match="sd has no options ToyOptions"):
        SD.chosen(ToyOptions)
    assert found.flow_metadata() == {
        "ss_weighting_scheme": "uniform", "ss_logit_mean": "0.0", "ss_logit_std": "1.0", "ss_mode_scale": "1.29",
        "ss_timestep_sampling": "shift", "ss_sigmoid_scale": "1.0", "ss_model_prediction_type": "sigma_scaled",
        "ss_discrete_flow_shift": "2.0",
    }  # fmt: skip


def test_the_caching_tools_configure_it_from_their_group() -> None:
    given = CacheToolOptions.from_args(argparse.Namespace(guidance_scale=2.0, timestep_sampling="uniform"))
    found = TOY.configured(given)
    assert found.chosen(ToyOptions).guidance_scale == 2.0
    assert found.chosen(FlowOptions).timestep_sampling == "uniform"
    assert reasons(given, found.declaration) == []  # they say by themselves what matters to them


# ---- rules ----


def idle(**given: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for names, reason in reasons(options(**given), TOY.declaration):
        for name in names:
            found.setdefault(name, []).append(reason)
    return found


#: option, run in which it changes nothing, what lifts that
CASES = [
    ("logit_mean", {"logit_mean": 0.5}, {"weighting_scheme": "logit_normal"}),
    ("logit_std", {"logit_std": 0.5}, {"weighting_scheme": "logit_normal"}),
    ("mode_scale", {"mode_scale": 0.5}, {"weighting_scheme": "mode"}),
    ("weighting_scheme", {"weighting_scheme": "none"}, {"weighting_scheme": "cosmap"}),
    ("weighting_scheme", {"weighting_scheme": "mode", "timestep_sampling": "shift"}, {"timestep_sampling": "sigma"}),
    ("logit_mean", {"weighting_scheme": "logit_normal", "logit_mean": 1.0, "timestep_sampling": "uniform"},
     {"timestep_sampling": "sigma"}),
    ("sigmoid_scale", {"sigmoid_scale": 2.0}, {"timestep_sampling": "flux_shift"}),
    ("sigmoid_scale", {"sigmoid_scale": 2.0, "timestep_sampling": "uniform"}, {"timestep_sampling": "sigmoid"}),
    ("discrete_flow_shift", {"discrete_flow_shift": 2.0, "timestep_sampling": "flux_shift"},
     {"timestep_sampling": "shift"}),
    ("discrete_flow_shift", {"discrete_flow_shift": 2.0, "timestep_sampling": "sigmoid"},
     {"timestep_sampling": "sigma"}),
    ("guidance_scale", {"guidance_scale": 2.0, "without_text": True}, {"without_text": False}),
]  # fmt: skip
#: act whenever they are given
ALWAYS = {"timestep_sampling", "model_prediction_type", "without_text", "helper", "blocks_to_swap"}


@pytest.mark.parametrize(("name", "given", "lifted"), CASES)
def test_own_options_without_effect(name: str, given: dict[str, object], lifted: dict[str, object]) -> None:
    assert name in idle(**given)
    assert name not in idle(**{**given, **lifted})


def test_no_own_option_is_forgotten() -> None:
    names = {field.name for group in TOY.declaration.groups.values() for field in dataclasses.fields(group)}
    covered = {case[0] for case in CASES}
    assert covered | ALWAYS == names and not covered & ALWAYS
    for rule in TOY.declaration.idle:
        for name in rule.names:
            assert any(case[0] == name and rule.reason in idle(**case[1]).get(name, []) for case in CASES) or (
                name in ("logit_std", "mode_scale")
            ), f"no case for --{name} {rule.reason}"


#: what DDPM alone has, each with a value
DDPM_VALUES: dict[str, object] = {
    "min_snr_gamma": 5.0, "debiased_estimation_loss": True, "v_parameterization": True,
    "scale_v_pred_loss_like_noise_pred": True, "v_pred_like_loss": 0.5, "zero_terminal_snr": True,
    "sample_sampler": "heun",
}  # fmt: skip


def test_options_of_ddpm_have_no_effect(tmp_path: Path) -> None:
    good = {
        "pretrained_model_name_or_path": "m", "network_module": "networks.lora", "output_dir": str(tmp_path / "out"),
        "train_data_dir": str(tmp_path), "learning_rate": 1e-4,
    }  # fmt: skip
    assert set(DDPM_VALUES) == set(DDPM_ONLY)
    # not an error by the rules of DDPM, such as v_pred_like_loss beside v_parameterization
    warnings = check(options(**good, **DDPM_VALUES), TOY)
    assert len([line for line in warnings if "no effect with flow matching" in line]) == len(DDPM_VALUES)
    with pytest.raises(UserError) as found:
        check(options(**good, **DDPM_VALUES, sigmoid_scale=2.0, strict=True), TOY)
    assert len(str(found.value).splitlines()) == len(DDPM_VALUES) + 1
    assert "--sigmoid_scale has no effect without --timestep_sampling sigmoid" in str(found.value)
    # all that shapes noise and loss has an effect
    acts = {
        "noise_offset": 0.1, "adaptive_noise_scale": 0.1, "multires_noise_iterations": 6, "ip_noise_gamma": 0.1,
        "ip_noise_gamma_random_strength": True, "loss_type": "huber", "huber_schedule": "exponential",
        "min_timestep": 100, "max_timestep": 900, "masked_loss": True,
    }  # fmt: skip
    assert check(options(**good, **acts), TOY) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sigmoid_scale": 0.0, "timestep_sampling": "shift"}, "--sigmoid_scale 0.0: must be greater than 0"),
        ({"discrete_flow_shift": -1.0}, "--discrete_flow_shift -1.0: must be greater than 0"),
        ({"logit_std": 0.0, "weighting_scheme": "logit_normal"}, "--logit_std 0.0: must be greater than 0"),
        ({"mode_scale": 1.8, "weighting_scheme": "mode"}, "--mode_scale 1.8: must be between -1 and 1.75"),
        ({"guidance_scale": -1.0}, "--guidance_scale -1.0: must be at least 0"),
        ({"helper": "h", "without_text": True}, "--helper: not with --without_text"),
        ({"sample_prompts": "gone.txt", "sample_at_first": True}, "--sample_prompts gone.txt: no such file"),
        ({"logit_mean": float("nan"), "weighting_scheme": "logit_normal"}, "--logit_mean nan: must be a finite number"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(options(**given), TOY)


# ---- pages ----


def test_pages_of_a_script_with_own_options() -> None:
    made = pages({"toy_train_network": TOY.declaration, "train_network": SD.declaration})
    assert "[`toy_train_network.py`](toy_train_network.md) | 12 |" in made["README.md"]
    page = made["toy_train_network.md"]
    assert page.index("## Toy model") < page.index("## Weighting of timesteps") < page.index("## Flow matching\n")
    (row,) = [line for line in page.splitlines() if line.startswith("| `--guidance_scale`")]
    assert "| number | `3.5` |" in row and row.endswith("| with --without_text |")
    assert "| blocks |" in page and "`--min_snr_gamma` | no effect with flow matching" in page
    assert "train_network.md" not in made and set(pages()) < {*made, *(f"{name}.md" for name in scripts())}


OWNERS = {"toy": TOY.declaration, **scripts()}


@pytest.mark.parametrize("own", OWNERS.values(), ids=OWNERS)
def test_own_numbers_have_units_and_declarations_name_options(own: Declaration) -> None:
    # a family's scripts of every kind share its declaration
    fields = {
        field.name
        for kind in (TrainNetworkOptions, TrainFullOptions)
        for field, _ in flat(with_groups(kind, own.groups).from_args(argparse.Namespace()))
    }
    for group in own.groups.values():
        for field in dataclasses.fields(group):
            assert not is_number(field) or unit_of(field) is not None, f"--{field.name}: unit= is missing"
    assert {*own.refused, *own.unused, *own.texts} <= fields
    assert {name for rule in own.idle for name in rule.names} <= fields


# ---- resuming ----


def test_what_a_resumed_run_must_share(tmp_path: Path) -> None:
    file = tmp_path / "helper.safetensors"
    file.write_bytes(b"weights")
    found = dict(option_values(options(helper=str(file), blocks_to_swap=3)))
    assert found["--guidance_scale"] == 3.5 and found["--timestep_sampling"] == "sigma"
    assert found["--helper"] == content_of(str(file)) and str(tmp_path) not in str(found["--helper"])
    assert "--blocks_to_swap" not in found
