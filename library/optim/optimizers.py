"""Optimizers by their published names, or any ``module.Class``.

Names, packages and arguments are checked before a model is loaded, by making the optimizer over a trial tensor; the
one that trains is made once the parameters exist.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType, MappingProxyType
from typing import Any

import torch

from library.errors import NoEffect, UserError, did_you_mean

#: learning rates at or below this are a mistake with optimizers that find the learning rate themselves
_LOW_RATE_FOR_ADAPTIVE = 0.1


@dataclass(frozen=True)
class _Known:
    """One published name."""

    name: str
    path: str  # full import path of the class
    package: str  # what pip installs
    implied: Mapping[str, Any] = field(default_factory=dict)


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

#: pip's names of the top-level modules of optimizers
_PACKAGES = {
    **{known.path.split(".")[0]: known.package for known in _KNOWN.values()},
    "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch_optimizer",
}

#: classes of torch.optim that cannot train here
_UNFIT = {
    "LBFGS": "it needs the loss several times a step",
    "SparseAdam": "it needs sparse gradients",
}

_ADAFACTOR = "transformers.optimization.Adafactor"

#: on the CPU their fused form takes a third of the time; benchmarks/RESULTS.md. torch never takes it by itself
_QUICKER_FUSED = ("torch.optim.AdamW", "torch.optim.Adam")
#: arguments that choose a form explicitly
_OTHER_FORMS = {"fused", "foreach", "capturable", "differentiable"}


@dataclass(frozen=True)
class OptimizerChoice:
    """A checked choice; ``create`` makes the optimizer."""

    name: str  # as published, or the import path
    path: str  # full import path of the class
    learning_rate: float
    args: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def _class_name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def finds_rate_itself(self) -> bool:
        """Whether the learning rate is a factor of a rate ``d`` that the optimizer finds: D-Adaptation and Prodigy."""
        return self._class_name.lower().startswith(("dadapt", "prodigy"))

    @property
    def finds_rate_per_group(self) -> bool:
        """Whether it finds a learning rate for each group: ProdigyPlus does, the others find one for all."""
        return self._class_name.startswith("ProdigyPlus")

    @property
    def uses_relative_step(self) -> bool:
        """Whether it is Adafactor with its own learning rate, which brings its schedule and has no group learning
        rates."""
        return self.path == _ADAFACTOR and bool(self.args["relative_step"])

    @property
    def metadata_name(self) -> str:
        """``module.Class(key=value,...)`` with the class's real module, for ``ss_optimizer``."""
        kind = _import_class(self.path)
        args = ",".join(f"{name}={value}" for name, value in self.args.items())
        return f"{kind.__module__}.{kind.__name__}" + (f"({args})" if args else "")

    def create(self, param_groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            param_groups: dicts with ``params`` and, optionally, ``lr``.

        Raises:
            UserError: the optimizer refuses an argument's value, or these groups.
        """
        groups = [dict(group) for group in param_groups]
        rate: float | None = self.learning_rate
        if self.uses_relative_step:
            rate = None
            for group in groups:
                group.pop("lr", None)
        if self.finds_rate_itself and not self.finds_rate_per_group:
            # some of these classes raise at the first step, others use the first group's learning rate for all
            rates: set[Any] = {group.get("lr", rate) for group in groups} - {0.0}
            if len(rates) > 1:
                raise UserError(
                    f"--optimizer_type {self.name}: it finds one rate for all parts, but they were given the factors "
                    f"{', '.join(f'{r:g}' for r in sorted(rates))}; give one value for --learning_rate, --unet_lr and "
                    "--text_encoder_lr, and no LoRA+ ratios and block rates"
                )
        kind = _import_class(self.path)
        leave_compiler_out()
        args = dict(self.args)
        if self.path in _QUICKER_FUSED and not _OTHER_FORMS & args.keys() and _are_float32_on_host(groups):
            args["fused"] = True
        try:
            return kind(groups, lr=rate, **args)
        except Exception as error:  # a third-party class: any error is about its arguments
            raise UserError(f"--optimizer_type {self.name}: {_one_line(error)}; see --optimizer_args") from error


def leave_compiler_out() -> None:
    """Keep optimizers from importing torch's compiler, which takes a second.

    Some methods of ``torch.optim.Optimizer`` import it at their first call, to be left out of compiled code. Only
    blocks of models are compiled here, never an optimizer.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        # the wrappers of torch._compile alone; others of these methods are wrapped for other reasons
        if isinstance(method, FunctionType) and plain and method.__code__.co_filename == torch._compile.__file__:
            vars(plain).setdefault("__dynamo_disable", plain)


def _are_float32_on_host(groups: Sequence[Mapping[str, Any]]) -> bool:
    parameters = [p for group in groups for p in group["params"]]
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)


def resolve_optimizer(
    optimizer_type: str,
    use_8bit_adam: bool,
    use_lion_optimizer: bool,
    optimizer_args: Sequence[str] | None,
    learning_rate: float,
    *,
    learning_rates_of_parts: Sequence[str] = (),
    learning_rate_given: bool = False,
) -> OptimizerChoice:
    """Find and check the optimizer that the flags name.

    Args:
        learning_rate_given: the user gave ``learning_rate``; if not, it is a default.
        rates_of_parts: the options given that set learning rates of parts of the model.

    Raises:
        UserError: contradicting flags, unknown name or argument, refused value, missing package.
    """
    if sum((bool(optimizer_type), use_8bit_adam, use_lion_optimizer)) > 1:
        raise UserError("--optimizer_type, --use_8bit_adam and --use_lion_optimizer exclude each other: give one")
    asked = "AdamW8bit" if use_8bit_adam else "Lion" if use_lion_optimizer else optimizer_type or "AdamW"
    known = _KNOWN.get(asked.lower())
    if known is not None:
        name, path, implied = known.name, known.path, known.implied
    else:
        name = path = _other_path(asked)
        implied = {}
    given = parse_keyword_arguments("--optimizer_args", optimizer_args)
    _check_arguments(name, path, given)
    args = {**implied, **given}
    given_rates = [*(["--learning_rate"] if learning_rate_given else []), *learning_rates_of_parts]
    warnings = _adafactor(args, given_rates) if path == _ADAFACTOR else []
    choice = OptimizerChoice(name, path, learning_rate, args)
    if choice.finds_rate_itself and not choice.finds_rate_per_group:
        for ratio in (name for name in learning_rates_of_parts if name.startswith("loraplus_")):
            raise UserError(f"--network_args {ratio}: {name} finds one rate for all; leave it out")
    if choice.finds_rate_itself and learning_rate <= _LOW_RATE_FOR_ADAPTIVE:
        warnings.append(
            f"--learning_rate {learning_rate:g} is a factor of the rate that {name} finds itself; 1.0 is usual"
        )
    # values are checked by the class itself; two axes, for those that refuse vectors
    choice.create([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
    return OptimizerChoice(name, path, learning_rate, args, tuple(warnings))


def _adafactor(args: dict[str, Any], learning_rates: Sequence[str]) -> list[str]:
    """Apply the published implications: relative step is the default, and ignores a given learning rate."""
    args.setdefault("relative_step", True)
    warnings: list[str] = []
    if args.get("warmup_init") and not args["relative_step"]:
        args["relative_step"] = True
        warnings.append("--optimizer_args warmup_init=True: relative_step is set to True, which it needs")
    if args["relative_step"] and learning_rates:
        warnings.append(
            NoEffect(
                f"{', '.join(learning_rates)}: no effect, as Adafactor with relative_step finds the learning rates "
                'itself; give --optimizer_args "relative_step=False" to use them'
            )
        )
    return warnings


def recorded_choice(record: str, now: OptimizerChoice) -> OptimizerChoice | None:
    """Return the choice with the ``metadata_name`` ``record``, of the class of ``now``; ``None`` if it cannot be
    parsed."""
    try:
        call = ast.parse(record, mode="eval").body
        words = call.keywords if isinstance(call, ast.Call) else []
        args = {str(w.arg): _recorded_value(w.value) for w in words}
    except (ValueError, SyntaxError, TypeError):
        return None
    return replace(now, args=args)


def _recorded_value(node: ast.expr) -> Any:
    # texts are recorded without quotes
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def parse_keyword_arguments(flag: str, words: Sequence[str] | None) -> dict[str, Any]:
    """``key=value`` words with Python literals as values.

    Raises:
        UserError: naming the flag and the word.
    """
    parsed: dict[str, Any] = {}
    for word in words or ():
        if word.count("=") != 1:
            raise UserError(f"{flag} {word!r}: write key=value, with one =")
        name, text = (part.strip() for part in word.split("="))
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            raise UserError(
                f"{flag} {word!r}: {text!r} is no Python literal; write numbers, True, False, None, tuples, or 'text'"
            ) from None
        if repr(before := parsed.setdefault(name, value)) != repr(value):  # nan is not equal to itself
            raise UserError(f"{flag}: {name} is given as {before!r} and as {value!r}; give it once")
    return parsed


def _other_path(asked: str) -> str:
    """Import path of a name that is not in the table: ``module.Class``, or a class of torch.optim."""
    if "." in asked:
        return asked
    classes = [name for name, kind in vars(torch.optim).items() if _is_optimizer(kind)]
    if asked in _UNFIT:
        raise UserError(f"--optimizer_type {asked}: cannot be used for training here, because {_UNFIT[asked]}")
    if asked not in classes:
        names = [known.name for known in _KNOWN.values()] + [name for name in classes if name not in _UNFIT]
        by_lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(asked.lower(), by_lower, n=1)
        hint = f' (did you mean "{by_lower[near[0]]}"?)' if near else ""
        raise UserError(
            f"--optimizer_type {asked}: no such optimizer{hint}; give a published name, a class of torch.optim, or "
            "module.Class"
        )
    return f"torch.optim.{asked}"


def _is_optimizer(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer


def _import_class(path: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = path.rpartition(".")
    top = module_name.split(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == top:
            package = _PACKAGES.get(top)
            remedy = f"run: pip install {package}" if package else "install the package that has it"
            missing = package or top
            raise UserError(f"--optimizer_type {path}: the package {missing} is not installed; {remedy}") from None
        raise UserError(f"--optimizer_type {path}: no module {error.name}") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"--optimizer_type {path}: importing {module_name} failed: {_one_line(error)}") from error
    kind = getattr(module, class_name, None)
    if kind is None:
        raise UserError(
            f"--optimizer_type {path}: {module_name} has no {class_name}{did_you_mean(class_name, dir(module))}"
        )
    if not _is_optimizer(kind):
        raise UserError(f"--optimizer_type {path}: not an optimizer class of torch's kind")
    return kind


def _check_arguments(asked: str, path: str, given: Mapping[str, Any]) -> None:
    parameters = inspect.signature(_import_class(path)).parameters
    if "lr" in given:
        raise UserError("--optimizer_args lr: give it as --learning_rate")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    names = [name for name in parameters if name not in ("self", "params", "lr")]
    for name in given:
        if name not in names:
            raise UserError(f"--optimizer_args {name}: {asked} has no such argument{did_you_mean(name, names)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
