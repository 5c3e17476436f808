"""Options of training ControlNet-LLLites, and the rules between them and the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.arguments import options_of_kind
from library.config.core.output import OutputOptions
from library.config.declaration import Declaration, Facts, Finding, error, idle
from library.config.fields import option
from library.config.paths import no_file


@dataclass(frozen=True)
class LLLiteOptions:
    """ControlNet-LLLite."""

    cond_emb_dim: int | None = option(
        None,
        "features of an image's embedding, an even number; 32 if not given, 16 to 64 are common",
        type=int,
        unit="features",
        minimum=2,
    )
    network_dim: int | None = option(
        None, "inner features of each layer's network; 64 if not given", type=int, unit="features", minimum=1
    )
    network_dropout: float | None = option(
        None,
        "dropout of the inner features in training, 0 to 1",
        type=float,
        neutral=(0,),
        unit="share, 0 to 1",
        minimum=0,
        below=1,
    )
    network_weights: str | None = option(None, "start from this ControlNet-LLLite file, with its sizes", harmless=True)


@dataclass(frozen=True)
class LLLiteOutputOptions(OutputOptions):
    __doc__ = OutputOptions.__doc__

    save_model_as: str | None = option("safetensors", "format of the file", choices=[None, "ckpt", "pt", "safetensors"])


#: all options of the scripts, except the families'
TrainLLLiteOptions = options_of_kind("TrainLLLiteOptions", "lllite", LLLiteOptions, LLLiteOutputOptions)


def sizes(o: Any, facts: Facts) -> Iterator[Finding]:
    if (o.lllite.cond_emb_dim or 0) % 2:
        yield error(f"--cond_emb_dim {o.lllite.cond_emb_dim}: must be even, as the first convolution has half of it")
    yield from no_file("network_weights", o.lllite.network_weights)


def images(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.loss.masked_loss:
        yield error(
            "--masked_loss: the images of conditioning_data_dir are what the network reads, not masks; remove it, and "
            "use alpha_mask for masks"
        )


def something_to_train(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.optimizer.learning_rate == 0:
        yield error("nothing to train: --learning_rate is 0; 2e-4 is usual for ControlNet-LLLites")


@idle("cond_emb_dim", "network_dim", reason="with --network_weights, whose sizes are used")
def sizes_come_from_the_file(o: Any) -> bool:
    return bool(o.lllite.network_weights)


_NO_METADATA = "for ControlNet-LLLites, whose files have no such metadata"

DECLARATION = Declaration(
    groups={"lllite": LLLiteOptions, "output": LLLiteOutputOptions},
    rules=(sizes, images, something_to_train),
    idle=(sizes_come_from_the_file,),
    unused={"no_metadata": _NO_METADATA, "training_comment": _NO_METADATA},
)
