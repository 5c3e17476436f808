"""Optimizers by their published names, or any ``module.Class``.

Names, packages and arguments are checked before a model is loaded; the class is made once the parameters exist.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.errors import UserError, did_you_mean

#: learning rates at or below this are a slip for optimizers that find the rate themselves
_LOW_RATE_FOR_ADAPTIVE = 0.1


@dataclass(frozen=True)
class _Known:
    """One published name."""

    name: str
    path: str  # full import path of the class
    package: str  # what pip installs
    implied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def top_module(self) -> str:
        return self.path.split(".")[0]


_NESTEROV = MappingProxyType({"nesterov": True, "momentum": 0.9})

_KNOWN = {
    known.name.lower(): known
    for known in (
        _Known("AdamW", "torch.optim.AdamW", "torch"),
        _Known("AdamW8bit", "bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
        _Known("PagedAdamW", "bitsandbytes.optim.PagedAdamW", "bitsandbytes"),
        _Known("PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
        _Known("PagedAdamW32bit", "bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes"),
        _Known("Lion", "lion_pytorch.Lion", "lion-pytorch"),
        _Known("Lion8bit", "bitsandbytes.optim.Lion8bit", "bitsandbytes"),
        _Known("PagedLion8bit", "bitsandbytes.optim.PagedLion8bit", "bitsandbytes"),
        _Known("SGDNesterov", "torch.optim.SGD", "torch", _NESTEROV),
        _Known("SGDNesterov8bit", "bitsandbytes.optim.SGD8bit", "bitsandbytes", _NESTEROV),
        _Known("DAdaptation", "dadaptation.experimental.DAdaptAdamPreprint", "dadaptation"),
        _Known("DAdaptAdamPreprint", "dadaptation.experimental.DAdaptAdamPreprint", "dadaptation"),
        _Known("DAdaptAdaGrad", "dadaptation.DAdaptAdaGrad", "dadaptation"),
        _Known("DAdaptAdam", "dadaptation.DAdaptAdam", "dadaptation"),
        _Known("DAdaptAdan", "dadaptation.DAdaptAdan", "dadaptation"),
        _Known("DAdaptAdanIP", "dadaptation.experimental.DAdaptAdanIP", "dadaptation"),
        _Known("DAdaptLion", "dadaptation.DAdaptLion", "dadaptation"),
        _Known("DAdaptSGD", "dadaptation.DAdaptSGD", "dadaptation"),
        _Known("Prodigy", "prodigyopt.Prodigy", "prodigyopt"),
        _Known("Adafactor", "transformers.optimization.Adafactor", "transformers"),
        _Known("RAdamScheduleFree", "schedulefree.RAdamScheduleFree", "schedulefree"),
        _Known("AdamWScheduleFree", "schedulefree.AdamWScheduleFree", "schedulefree"),
        _Known("SGDScheduleFree", "schedulefree.SGDScheduleFree", "schedulefree"),
    )
}


@dataclass(frozen=True)
class OptimizerChoice:
    """A checked choice; ``create`` makes the optimizer."""

    name: str  # as published, or the import path
    path: str
    learning_rate: float
    args: Mapping[str, Any]
    warnings: tuple[str, ...] = field(default=())

    @property
    def finds_rate_itself(self) -> bool:
        """D-Adaptation and Prodigy: the learning rate is a factor of the rate they find."""
        return self.name.lower().startswith(("dadapt", "prodigy")) or "ProdigyPlus" in self.path

    @property
    def is_schedule_free(self) -> bool:
        return self.path.lower().endswith("schedulefree")

    @property
    def uses_relative_step(self) -> bool:
        """Adafactor with its own rate: brings its scheduler, and no group rates."""
        return self.path == "transformers.optimization.Adafactor" and bool(self.args["relative_step"])

    @property
    def metadata_name(self) -> str:
        """``module.Class(key=value,...)`` with the class's real module, for ``ss_optimizer``."""
        kind = _import_class(self.path)
        args = ",".join(f"{name}={value}" for name, value in self.args.items())
        return f"{kind.__module__}.{kind.__name__}" + (f"({args})" if args else "")

    def create(self, param_groups: Sequence[Mapping[str, Any]]) -> Any:
        """Make the optimizer.

        Args:
            param_groups: dicts with ``params`` and, optionally, ``lr``.

        Raises:
            UserError: the optimizer refuses an argument's value.
        """
        kind = _import_class(self.path)
        groups = [dict(group) for group in param_groups]
        rate: float | None = self.learning_rate
        if self.uses_relative_step:
            rate = None
            for group in groups:
                group.pop("lr", None)
        try:
            return kind(groups, lr=rate, **self.args)
        except (TypeError, ValueError) as error:
            raise UserError(f"--optimizer_type {self.name}: {error}; see --optimizer_args") from None

    def set_training(self, optimizer: Any, training: bool) -> None:
        """Schedule-free optimizers keep two sets of weights: switch to those for training, or for use."""
        if optimizer is None or not self.is_schedule_free:
            return
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.train() if training else inner.eval()


def resolve_optimizer(
    optimizer_type: str,
    use_8bit_adam: bool,
    use_lion_optimizer: bool,
    optimizer_args: Sequence[str] | None,
    learning_rate: float,
    *,
    separate_rates: bool = False,
) -> OptimizerChoice:
    """Find and check the optimizer that the flags name.

    Args:
        separate_rates: whether parts of the model were given rates of their own.

    Raises:
        UserError: contradicting flags, unknown name or argument, missing package.
    """
    if sum((bool(optimizer_type), use_8bit_adam, use_lion_optimizer)) > 1:
        raise UserError("--optimizer_type, --use_8bit_adam and --use_lion_optimizer exclude each other: give one")
    asked = "AdamW8bit" if use_8bit_adam else "Lion" if use_lion_optimizer else optimizer_type or "AdamW"
    known = _KNOWN.get(asked.lower())
    if known is not None:
        _require_package(asked, known.top_module, known.package)
        path, implied = known.path, dict(known.implied)
    else:
        path, implied = _other_path(asked), {}
    given = parse_keyword_arguments("--optimizer_args", optimizer_args)
    _check_arguments(asked, path, given)
    args = {**implied, **given}
    warnings = []
    if path == "transformers.optimization.Adafactor":
        warnings += _adafactor(args, separate_rates)
    choice = OptimizerChoice(known.name if known else asked, path, learning_rate, args)
    if choice.finds_rate_itself and learning_rate <= _LOW_RATE_FOR_ADAPTIVE:
        warnings.append(
            f"--learning_rate {learning_rate:g} is a factor of the rate that {choice.name} finds itself; 1.0 is usual"
        )
    return OptimizerChoice(choice.name, path, learning_rate, args, tuple(warnings))


def _adafactor(args: dict[str, Any], separate_rates: bool) -> list[str]:
    """Published implications: relative step by default, forced by warmup_init; it has no rates of parts."""
    args.setdefault("relative_step", True)
    warnings = []
    if args.get("warmup_init") and not args["relative_step"]:
        args["relative_step"] = True
        warnings.append("--optimizer_args warmup_init=True: relative_step is set to True, which it needs")
    if args["relative_step"] and separate_rates:
        warnings.append(
            "Adafactor with relative_step finds one rate for all: --unet_lr, --text_encoder_lr and LoRA+ ratios have "
            'no effect; give --optimizer_args "relative_step=False" to use them'
        )
    return warnings


def parse_keyword_arguments(flag: str, words: Sequence[str] | None) -> dict[str, Any]:
    """``key=value`` words with Python literals as values.

    Raises:
        UserError: naming the flag and the word.
    """
    parsed = {}
    for word in words or ():
        if word.count("=") != 1:
            raise UserError(f"{flag} {word!r}: write key=value, with one =")
        name, text = (part.strip() for part in word.split("="))
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise UserError(
                f"{flag} {word!r}: {text!r} is no Python literal; write numbers, True, False, None, tuples, or 'text'"
            ) from None
    return parsed


def _require_package(asked: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"--optimizer_type {asked}: the package {package} is not installed; run: pip install {package}")


def _other_path(asked: str) -> str:
    """Import path of a name that is not in the table: a torch class, or ``module.Class``."""
    if "." not in asked:
        import torch

        if isinstance(getattr(torch.optim, asked, None), type):
            return f"torch.optim.{asked}"
        names = [known.name for known in _KNOWN.values()] + [n for n in dir(torch.optim) if n[0].isupper()]
        raise UserError(
            f"--optimizer_type {asked}: no such optimizer{did_you_mean(asked, names)}; give a published name, a class of "
            "torch.optim, or module.Class"
        )
    _import_class(asked)
    return asked


def _import_class(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--optimizer_type {path}: the module {error.name} is not installed; install the package that has it"
        ) from None
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(
            f"--optimizer_type {path}: {module_name} has no {class_name}{did_you_mean(class_name, dir(module))}"
        )
    return found


def _check_arguments(asked: str, path: str, given: Mapping[str, Any]) -> None:
    if not given:
        return
    parameters = inspect.signature(_import_class(path)).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    names = [name for name in parameters if name not in ("self", "params", "lr")]
    for name in given:
        if name not in names:
            raise UserError(f"--optimizer_args {name}: {asked} has no such argument{did_you_mean(name, names)}")
