"""Options of adapter training, and the rules between them and the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.arguments import RunOptions
from library.config.core.optimizer import OptimizerOptions
from library.config.declaration import Declaration, Facts, Finding, Implied, error, idle, joined, warning
from library.config.fields import option
from library.config.paths import no_file
from library.training.kinds.adapter_word_options import DECLARATION as WORD
from library.training.kinds.adapter_word_options import WordOptions


@dataclass(frozen=True)
class NetworkOptions:
    """Network."""

    network_module: str | None = option(
        None, "what is trained: networks.lora (or lora_fa, dylora, oft), or a third-party module such as lycoris.kohya"
    )
    network_dim: int | None = option(
        None, "rank; 4 to 128 are common (the module's default, if not given)", type=int, unit="rank", minimum=1
    )
    network_alpha: float = option(
        1, "strength is alpha / rank; half the rank is common", type=float, unit="", minimum=0
    )
    network_dropout: float | None = option(
        None,
        "dropout of the adapter's inner values in training, 0 to 1",
        type=float,
        neutral=(0,),
        unit="share, 0 to 1",
        minimum=0,
        maximum=1,
    )
    network_args: list[str] | None = option(
        None, "more options of the module, key=value, e.g. conv_dim=4 conv_alpha=1", nargs="*"
    )
    network_train_unet_only: bool = option(False, "train the U-Net's adapters only")
    network_train_text_encoder_only: bool = option(False, "train the text encoder's adapters only")
    network_weights: str | None = option(None, "start from these adapter weights", harmless=True)
    dim_from_weights: bool = option(False, "take ranks from --network_weights", harmless=True)
    scale_weight_norms: float | None = option(
        None,
        "scale adapters down to this norm after each step; 1 is a start",
        type=float,
        neutral=(0,),
        unit="norm",
        above=0,
    )
    base_weights: list[str] | None = option(
        None, "adapter files to merge into the base model first", nargs="*", harmless=True
    )
    base_weights_multiplier: list[float] | None = option(
        None,
        "strength of each (1, if not given)",
        type=float,
        nargs="*",
        unit="",
    )

    @property
    def module(self) -> str:
        """Return the network module, which rules require."""
        assert self.network_module
        return self.network_module


@dataclass(frozen=True)
class AdapterOptimizerOptions(OptimizerOptions):
    __doc__ = OptimizerOptions.__doc__

    unet_lr: float | None = option(
        None,
        "learning rate of the U-Net's adapters (as --learning_rate, if not given)",
        type=float,
        unit="rate",
        minimum=0,
    )
    text_encoder_lr: list[float] | None = option(
        None,
        "learning rates of the text encoders' adapters, one for each; the last is for all further encoders",
        type=float,
        nargs="*",
        unit="rate",
        minimum=0,
    )
    text_encoder_lr1: float | None = option(
        None,
        "learning rate of the first text encoder's adapters (CLIP-L), instead of --text_encoder_lr",
        type=float,
        unit="rate",
        minimum=0,
    )
    text_encoder_lr2: float | None = option(
        None,
        "the same for the second (OpenCLIP ViT-bigG of SDXL, T5-XXL of FLUX.1)",
        type=float,
        unit="rate",
        minimum=0,
    )

    @property
    def text_encoder_lrs(self) -> list[float] | None:
        """Return one learning rate for all text encoders, or one for each; ``None`` if ``learning_rate`` is used."""
        numbered = (self.text_encoder_lr1, self.text_encoder_lr2)
        if any(rate is not None for rate in numbered):
            return [self.learning_rate if rate is None else rate for rate in numbered]
        return self.text_encoder_lr or None


@dataclass(frozen=True)
class TrainNetworkOptions(RunOptions):
    """All options of adapter training, by group."""

    optimizer: AdapterOptimizerOptions
    network: NetworkOptions
    word: WordOptions

    @classmethod
    def groups(cls) -> dict[str, type]:
        """Return the dataclass of each attribute, in the order of ``--help``."""
        (first, second, *rest) = super().groups().items()
        return dict([first, second, ("network", NetworkOptions), ("word", WordOptions), *rest])


# ---- what cannot work ----


def needs_network(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.network.network_module:
        yield error("--network_module: name what is trained, e.g. networks.lora")


def network_parts(o: Any, facts: Facts) -> Iterator[Finding]:
    n = o.network
    if n.network_train_unet_only and n.network_train_text_encoder_only:
        yield error("--network_train_unet_only and --network_train_text_encoder_only exclude each other")


def network_files(o: Any, facts: Facts) -> Iterator[Finding]:
    yield from no_file("network_weights", o.network.network_weights)
    for path in o.network.base_weights or []:
        yield from no_file("base_weights", path)
    n = o.network
    if n.dim_from_weights and not n.network_weights:
        yield error("--dim_from_weights: needs --network_weights, the file to take ranks from")
    if n.base_weights_multiplier and len(n.base_weights_multiplier) > len(n.base_weights or []):
        yield error("--base_weights_multiplier: more values than --base_weights files")


def rates(o: Any, facts: Facts) -> Iterator[Finding]:
    """Learning rates of 0 leave a part as it is; without any other, a run would end when its models are loaded."""
    n, chosen = o.network, o.optimizer
    if n.network_train_unet_only and n.network_train_text_encoder_only:
        return  # which is an error of its own
    if any(word.partition("=")[0].strip() == "network_reg_lrs" for word in n.network_args or []):
        return  # learning rates that replace those of the parts
    denoiser = chosen.learning_rate if chosen.unet_lr is None else chosen.unet_lr
    text = max(chosen.text_encoder_lr or [chosen.learning_rate])
    if (n.network_train_text_encoder_only or denoiser == 0) and (n.network_train_unet_only or text == 0):
        yield error("nothing to train: --learning_rate, --unet_lr and --text_encoder_lr leave every rate at 0")


#: below it an adapter changes next to nothing in a usual run; the published default, 2e-6, is for whole models
_LOW_LEARNING_RATE = 5e-6


def low_learning_rate(o: Any, facts: Facts) -> Iterator[Finding]:
    """A default that no one should train with; optimizers that find the learning rate warn by themselves."""
    n, chosen = o.network, o.optimizer
    if (
        not n.network_module
        or chosen.finds_learning_rate
        or any(word.partition("=")[0].strip() == "network_reg_lrs" for word in n.network_args or [])
    ):
        return
    highest: dict[str, float] = {}
    if not n.network_train_text_encoder_only:
        highest |= {"learning_rate": chosen.learning_rate} if chosen.unet_lr is None else {"unet_lr": chosen.unet_lr}
    if not n.network_train_unet_only:
        given = chosen.text_encoder_lrs
        highest |= {"text_encoder_lr": max(given)} if given else {"learning_rate": chosen.learning_rate}
    option, value = max(highest.items(), key=lambda item: item[1], default=("", 0.0))
    if 0 < value < _LOW_LEARNING_RATE:
        default = " (the default)" if value == type(chosen).learning_rate else ""
        yield warning(
            f"--{option} {value:g}{default}: teaches an adapter next to nothing; 1e-4 is usual (docs/first_lora.md)"
        )


def cached_texts(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check cached text encoders; in some families, encoders are trained beside cached outputs of others."""
    d = o.dataset
    if not (d.cache_text_encoder_outputs or d.cache_text_encoder_outputs_to_disk):
        return
    flag = "--cache_text_encoder_outputs" + ("_to_disk" if d.cache_text_encoder_outputs_to_disk else "")
    if all(facts.trained_encoders) and not o.word.train_embedding:
        yield error(
            f"{flag}: not while the text encoder is trained, whose outputs change; "
            "add --network_train_unet_only, or remove it"
        )
    if o.network.base_weights:
        yield error(
            f"{flag}: not with --base_weights, which may change the text encoder; merge them into the model first, "
            "or remove one of them"
        )


def text_rates(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check the number of learning rates; programs write two for every model, and surplus ones are ignored.

    The last one is for all further text encoders too.
    """
    given = o.optimizer.text_encoder_lr or []
    if o.network.network_train_unet_only or len(given) <= 1:
        return
    there = facts.text_encoders
    numbers = f"--text_encoder_lr has {len(given)} values, and the model has {there} text encoder{'s'[: there != 1]}"
    if set(given[there:]) - set(given[:there]):  # the same value written twice loses nothing
        yield warning(f"{numbers}: {' '.join(f'{lr:g}' for lr in given[:there])} is used")


def numbered_rates(o: Any, facts: Facts) -> Iterator[Finding]:
    """Check ``--text_encoder_lr1`` and ``2``, which are for models with two encoders."""
    names = ("text_encoder_lr1", "text_encoder_lr2")
    given = ", ".join(f"--{name}" for name in names if getattr(o.optimizer, name) is not None)
    if not given:
        return
    if (count := facts.text_encoders) != len(names):
        yield error(f"{given}: for models with two text encoders, this one has {count}; use --text_encoder_lr")
    elif o.optimizer.text_encoder_lr:
        yield error(f"{given}: not with --text_encoder_lr, which sets the same rates; remove one of them")


# ---- what has no effect ----


@idle("text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2", reason="with --network_train_unet_only")
def text_encoders_are_frozen(o: Any) -> bool:
    return o.network.network_train_unet_only


@idle("unet_lr", reason="with --network_train_text_encoder_only")
def denoiser_is_frozen(o: Any) -> bool:
    return o.network.network_train_text_encoder_only


@idle("learning_rate", reason="where every trained part has its own learning rate (--unet_lr, --text_encoder_lr)")
def every_part_has_its_rate(o: Any) -> bool:
    has_unet = o.optimizer.unet_lr is not None or o.network.network_train_text_encoder_only
    numbered = o.optimizer.text_encoder_lr1 is not None and o.optimizer.text_encoder_lr2 is not None
    has_text = bool(o.optimizer.text_encoder_lr) or numbered or o.network.network_train_unet_only
    return has_unet and has_text


@idle("network_dim", "network_alpha", reason="with --dim_from_weights, which takes ranks and alphas from the file")
def ranks_come_from_the_file(o: Any) -> bool:
    return o.network.dim_from_weights


@idle("network_weights", reason="with --resume, whose state holds the weights")
def weights_come_from_the_state(o: Any) -> bool:
    return bool(o.resume.resume) and not o.network.dim_from_weights


# ---- what follows from other options ----


def _text_rate(o: Any) -> Implied | None:
    names = ("text_encoder_lr1", "text_encoder_lr2")
    numbered = [f"--{name}" for name in names if getattr(o.optimizer, name) is not None]
    if numbered:
        return Implied(o.optimizer.text_encoder_lrs, "follows from " + ", ".join(numbered))
    if o.network.network_train_unet_only:
        return None
    return Implied([o.optimizer.learning_rate], "follows from --learning_rate")


def _unet_rate(o: Any) -> Implied | None:
    if o.network.network_train_text_encoder_only:
        return None
    return Implied(o.optimizer.learning_rate, "follows from --learning_rate")


def _multipliers(o: Any) -> Implied | None:
    files = o.network.base_weights
    return Implied([1.0] * len(files), "follows from --base_weights") if files else None


_OWN = Declaration(
    groups={"network": NetworkOptions, "optimizer": AdapterOptimizerOptions},
    follows={"unet_lr": _unet_rate, "text_encoder_lr": _text_rate, "base_weights_multiplier": _multipliers},
    rules=(
        needs_network,
        network_parts,
        network_files,
        rates,
        low_learning_rate,
        cached_texts,
        text_rates,
        numbered_rates,
    ),
    idle=(
        text_encoders_are_frozen,
        denoiser_is_frozen,
        every_part_has_its_rate,
        ranks_come_from_the_file,
        weights_come_from_the_state,
    ),
)

DECLARATION = joined(_OWN, WORD)
