"""Optimizers by name: classes, arguments, mistakes, exact resume."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch

from library.errors import UserError
from library.optim.optimizers import OptimizerChoice, resolve_optimizer
from library.optim.param_groups import default_descriptions, lr_log_entries
from library.optim.schedulers import ScheduleSettings, create_scheduler
from library.optim.trial import is_schedule_free
from library.optim.two_weights import use_weights


def resolve(name: str = "", *args: str, lr: float = 1e-3, **more: object) -> OptimizerChoice:
    return resolve_optimizer(name, False, False, list(args), lr, **more)


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(*shape))


#: published name -> the package that has it
PUBLISHED = {
    **dict.fromkeys(("AdamW", "SGDNesterov"), "torch"),
    **dict.fromkeys(("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"), "bitsandbytes"),
    **dict.fromkeys(("Lion8bit", "PagedLion8bit", "SGDNesterov8bit"), "bitsandbytes"),
    "Lion": "lion_pytorch",
    "Prodigy": "prodigyopt",
    "Adafactor": "transformers",
    **dict.fromkeys(("DAdaptation", "DAdaptAdamPreprint", "DAdaptAdaGrad", "DAdaptAdam"), "dadaptation"),
    **dict.fromkeys(("DAdaptAdan", "DAdaptAdanIP", "DAdaptLion", "DAdaptSGD"), "dadaptation"),
    **dict.fromkeys(("RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree"), "schedulefree"),
}
#: the published examples of other names
OTHERS = {
    "RMSprop": "torch",
    "bitsandbytes.optim.AdEMAMix8bit": "bitsandbytes",
    "bitsandbytes.optim.PagedAdEMAMix8bit": "bitsandbytes",
    "prodigyplus.ProdigyPlusScheduleFree": "prodigyplus",
    "pytorch_optimizer.CAME": "pytorch_optimizer",
}
SCHEDULE_FREE = {name: package for name, package in {**PUBLISHED, **OTHERS}.items() if name.endswith("ScheduleFree")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "torch.optim.adamw.AdamW"),
        ("adamw", "torch.optim.adamw.AdamW"),
        ("AdamW8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
        ("Lion", "lion_pytorch.lion_pytorch.Lion"),
        ("SGDNesterov", "torch.optim.sgd.SGD(nesterov=True,momentum=0.9)"),
        ("Adafactor", "transformers.optimization.Adafactor(relative_step=True)"),
        ("Prodigy", "prodigyopt.prodigy.Prodigy"),
        ("RMSprop", "torch.optim.rmsprop.RMSprop"),
        ("torch.optim.Adagrad", "torch.optim.adagrad.Adagrad"),
        ("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
    ],
)
def test_names(name: str, text: str) -> None:
    pytest.importorskip(text.split(".")[0])
    assert resolve(name, lr=1.0).metadata_name == text


def test_arguments_are_python_literals() -> None:
    choice = resolve("AdamW", "weight_decay=0.01", "betas=.9,.99")
    optimizer = choice.create([{"params": [torch.nn.Parameter(torch.ones(1))]}])
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["betas"]) == (0.01, (0.9, 0.99))
    assert choice.metadata_name == "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))"


def test_old_flags() -> None:
    for name, package, flags in (("AdamW8bit", "bitsandbytes", (True, False)), ("Lion", "lion_pytorch", (False, True))):
        if importlib.util.find_spec(package):
            assert resolve_optimizer("", *flags, None, 1e-4).name == name
    with pytest.raises(UserError, match="exclude each other"):
        resolve_optimizer("AdamW", True, False, None, 1e-4)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("AdamWW", [], 'did you mean "AdamW"'),
        ("torch.optim.AdmW", [], 'did you mean "AdamW"'),
        ("nopackage.Optimizer", [], "nopackage is not installed"),
        ("AdamW", ["weight_decy=1"], 'did you mean "weight_decay"'),
        ("AdamW", ["weight_decay"], "key=value"),
        ("AdamW", ["a=b=c"], "key=value"),
        ("AdamW", ["weight_decay=high"], "no Python literal"),
        ("AdamW", ["eps=1e-8", "eps=1e-7"], "give it once"),
        ("AdamW", ["lr=1.0"], "--learning_rate"),
        ("AdamW", ["betas=(2.0,0.9)"], "Invalid beta parameter"),
        ("adamww", [], 'did you mean "AdamW"'),
        ("rmsprop", [], 'did you mean "RMSprop"'),
        ("LBFGS", [], "several times a step"),
        ("Optimizer", [], "no such optimizer"),
        ("torch.nn.Linear", [], "not an optimizer"),
        ("torch.optim_.AdamW", [], "no module torch.optim_"),
        ("AdamWScheduleFree", [], "pip install schedulefree"),
        ("DAdaptAdam", [], "pip install dadaptation"),
        ("prodigyplus.ProdigyPlusScheduleFree", [], "pip install prodigy-plus-schedule-free"),
    ],
)
def test_mistakes(name: str, args: list[str], words: str) -> None:
    if "pip install" in words:
        package = name.split(".")[0] if "." in name else words.rsplit(" ", 1)[1]
        if importlib.util.find_spec(package):
            pytest.skip("the package is there")
    with pytest.raises(UserError) as found:
        resolve(name, *args)
    assert words in str(found.value)
    assert len(str(found.value).splitlines()) == 1


def test_one_found_rate_cannot_serve_two_factors() -> None:
    pytest.importorskip("prodigyopt")
    choice = resolve("Prodigy", lr=1.0)
    groups = [{"params": [parameter(1)], "lr": 0.5}, {"params": [parameter(1)], "lr": 1.0}]
    with pytest.raises(UserError, match="0.5, 1"):
        choice.create(groups)
    groups[0]["lr"] = 0.0  # a part that is not trained is no contradiction
    assert len(choice.create(groups).param_groups) == 2


def test_one_found_rate_excludes_lora_plus_before_anything_is_loaded() -> None:
    pytest.importorskip("prodigyopt")
    with pytest.raises(UserError, match="loraplus_lr_ratio: Prodigy finds one rate for all"):
        resolve("Prodigy", lr=1.0, learning_rates_of_parts=["--unet_lr", "loraplus_lr_ratio"])
    assert resolve("Prodigy", lr=1.0, learning_rates_of_parts=["--unet_lr"])


def test_adafactor_relative_step() -> None:
    choice = resolve("Adafactor", learning_rates_of_parts=["--unet_lr", "loraplus_lr_ratio"])
    (warning,) = choice.warnings
    assert choice.uses_relative_step and warning.startswith("--unet_lr, loraplus_lr_ratio: no effect")
    optimizer = choice.create([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}])
    assert optimizer.param_groups[0]["lr"] is None
    own = resolve("Adafactor", "relative_step=False")
    assert not own.uses_relative_step and not own.warnings
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5}]
    assert own.create(groups).param_groups[0]["lr"] == 0.5
    forced = resolve("Adafactor", "relative_step=False", "warmup_init=True")
    assert forced.uses_relative_step and forced.warnings


def test_names_are_read_in_any_case() -> None:
    assert resolve("ADAMW8BIT").name == "AdamW8bit"
    assert resolve("sgdnesterov").args == {"nesterov": True, "momentum": 0.9}
    assert resolve("SGDNesterov", "momentum=0.5").args["momentum"] == 0.5


def test_adaptive_optimizers_warn_of_a_low_rate() -> None:
    pytest.importorskip("prodigyopt")
    assert resolve("Prodigy", lr=1e-4).warnings and not resolve("Prodigy", lr=1.0).warnings


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("name", "package"), {**PUBLISHED, **OTHERS}.items())
def test_a_restored_optimizer_goes_on_exactly(name: str, package: str) -> None:
    pytest.importorskip(package)
    resume_exactly(resolve(name, lr=1.0))


def test_an_adafactor_with_given_rates_goes_on_exactly() -> None:
    resume_exactly(resolve("Adafactor", "relative_step=False", "scale_parameter=False", "beta1=0.9"))


def resume_exactly(choice: OptimizerChoice) -> None:
    """Three steps, a file, three more: with the restored optimizer and with the one that went on."""
    # 8-bit states are used from 4096 values on
    weights = torch.nn.Parameter(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))

    def make(parameter: torch.nn.Parameter) -> tuple:
        optimizer = choice.create([{"params": [parameter], "lr": choice.learning_rate}])
        use_weights(optimizer, for_training=True)
        return parameter, optimizer, create_scheduler(optimizer, choice, ScheduleSettings(), total_steps=6)

    def step(seed: int, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, schedule: object) -> None:
        parameter.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        schedule.step()

    first = make(weights)
    for seed in range(3):
        step(seed, *first)
    if choice.name.endswith("8bit"):
        assert torch.uint8 in {value.dtype for value in first[1].state[weights].values() if torch.is_tensor(value)}
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first[1:]], file)
    file.seek(0)
    second = make(torch.nn.Parameter(weights.detach().clone()))
    for part, state in zip(second[1:], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    before = weights.detach().clone()
    for seed in range(3, 6):
        step(seed, *first)
        step(seed, *second)
    assert not torch.equal(weights, before)
    assert torch.equal(weights, second[0])
    assert first[1].param_groups[0]["lr"] == second[1].param_groups[0]["lr"]


def test_schedule_free_weights_are_switched() -> None:
    pytest.importorskip("schedulefree")
    choice = resolve("AdamWScheduleFree", lr=0.1)
    assert is_schedule_free(choice) and not is_schedule_free(resolve("AdamW"))
    weights = parameter(3)
    optimizer = choice.create([{"params": [weights]}])
    use_weights(optimizer, for_training=True)
    for _ in range(3):
        weights.grad = torch.ones(3)
        optimizer.step()
    trained = weights.detach().clone()
    use_weights(optimizer, for_training=False)
    assert not torch.equal(weights, trained)
    use_weights(optimizer, for_training=True)
    torch.testing.assert_close(weights.detach(), trained)


@pytest.mark.parametrize(("name", "package"), SCHEDULE_FREE.items())
def test_a_look_at_schedule_free_weights_leaves_training_as_it_was(name: str, package: str) -> None:
    """Saving, drawing and validating must not change what is trained by as much as rounding."""
    pytest.importorskip(package)
    choice = resolve(name, lr=1.0 if "Prodigy" in name else 0.1)
    assert is_schedule_free(choice)
    ways = []
    for looks in (False, True):
        weights = torch.nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
        optimizer = choice.create([{"params": [weights], "lr": choice.learning_rate}])
        use_weights(optimizer, for_training=True)
        for step in range(8):
            weights.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if looks:
                trained = weights.detach().clone()
                use_weights(optimizer, for_training=False)
                use_weights(optimizer, for_training=False)
                assert step < 7 or not torch.equal(weights, trained)
                use_weights(optimizer, for_training=True)
                assert torch.equal(weights, trained)
        use_weights(optimizer, for_training=False)
        ways.append(weights.detach().clone())
    assert torch.equal(*ways)


def test_prodigy_plus_brings_its_schedule_and_finds_a_rate_for_each_group() -> None:
    pytest.importorskip("prodigyplus")
    choice = resolve("prodigyplus.ProdigyPlusScheduleFree", "d_coef=0.5", lr=1.0)
    groups = [{"params": [parameter(4, 4)], "lr": rate} for rate in (1.0, 0.5)]  # other rates are no contradiction
    optimizer = choice.create(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    entries = lr_log_entries(optimizer, choice, ["textencoder", "unet"])
    assert set(entries) == {"lr/textencoder", "lr/unet", "lr/d*lr/textencoder", "lr/d*lr/unet"}
    assert resolve("prodigyplus.ProdigyPlusScheduleFree", lr=1e-4).warnings


def test_default_descriptions() -> None:
    assert default_descriptions(3, trains_text_encoder=True) == ["textencoder", "unet", None]
    assert default_descriptions(2, trains_text_encoder=False) == ["unet", None]
    assert default_descriptions(1, trains_text_encoder=True) == ["textencoder"]


def test_log_entries() -> None:
    choice = resolve("AdamW")
    one, two = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = choice.create([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.2}])
    entries = lr_log_entries(optimizer, choice, ["textencoder", "unet"])
    assert entries == {"lr/textencoder": 0.1, "lr/unet": 0.2}, "each curve once"
    assert lr_log_entries(optimizer, choice, [None, None]) == {"lr/group0": 0.1, "lr/group1": 0.2}
    assert lr_log_entries(optimizer, choice, ["unet", "unet"]) == {"lr/unet": 0.1, "lr/group1": 0.2}


def test_log_entries_of_a_found_rate() -> None:
    pytest.importorskip("prodigyopt")
    choice = resolve("Prodigy", lr=1.0)
    optimizer = choice.create([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}])
    entries = lr_log_entries(optimizer, choice, ["unet"])
    assert set(entries) == {"lr/unet", "lr/d*lr/unet"}
    assert entries["lr/d*lr/unet"] == pytest.approx(1e-6)
