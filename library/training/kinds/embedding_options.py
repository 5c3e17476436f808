"""Options of textual inversion, and the rules between them and the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.arguments import options_of_kind
from library.config.core.output import OutputOptions
from library.config.declaration import Declaration, Facts, Finding, error, warning
from library.config.fields import option
from library.config.paths import no_file


@dataclass(frozen=True)
class EmbeddingOptions:
    """Textual inversion."""

    token_string: str | None = option(None, "the new word, as written in captions and prompts")
    init_word: str | None = option(None, "known words from which it starts, e.g. cat")
    num_vectors_per_token: int = option(1, "number of vectors (tokens) of the word", type=int, unit="tokens", minimum=1)
    weights: str | None = option(None, "start from this embedding file", harmless=True)
    use_object_template: bool = option(
        False, 'train on captions such as "a photo of a ..." instead of the captions of the images'
    )
    use_style_template: bool = option(False, 'train on captions such as "a painting in the style of ..." instead')


@dataclass(frozen=True)
class EmbeddingOutputOptions(OutputOptions):
    __doc__ = OutputOptions.__doc__

    save_model_as: str = option("pt", "format of the embedding", choices=[None, "ckpt", "pt", "safetensors"])


#: all options of the scripts of textual inversion, except the families'
TrainEmbeddingOptions = options_of_kind("TrainEmbeddingOptions", "embedding", EmbeddingOptions, EmbeddingOutputOptions)


def word(o: Any, facts: Facts) -> Iterator[Finding]:
    own = o.embedding
    token = own.token_string
    if not token:
        yield error("--token_string: name the new word, e.g. --token_string my_cat")
    elif len(token.split()) != 1:
        yield error(f"--token_string {token!r}: must be one word without spaces")
    elif "/" in token or "\\" in token:
        yield error(f"--token_string {token}: must have no / and no \\, as programs take the word from the file's name")
    if not own.init_word and not own.weights:
        yield error("--init_word: name a known word to start from, e.g. cat, or a file with --weights")
    yield from no_file("weights", own.weights)
    room = o.model.max_token_length or 75
    if own.num_vectors_per_token > room:
        yield error(
            f"--num_vectors_per_token {own.num_vectors_per_token}: a caption has {room} tokens, one for each vector; "
            "give fewer (up to 16 is usual), or --max_token_length"
        )
    if own.use_object_template and own.use_style_template:
        yield error("--use_object_template and --use_style_template exclude each other: give one")


def cached_texts(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.dataset.cache_text_encoder_outputs or o.dataset.cache_text_encoder_outputs_to_disk:
        yield error("--cache_text_encoder_outputs: not for textual inversion, which changes the outputs; remove it")


def learning_rate(o: Any, facts: Facts) -> Iterator[Finding]:
    chosen = o.optimizer
    if chosen.learning_rate == 0:
        yield error("nothing to train: --learning_rate is 0; 1e-3 to 5e-3 are common for embeddings")
    elif chosen.learning_rate == type(chosen).learning_rate and not chosen.finds_learning_rate:
        yield warning(
            f"--learning_rate {chosen.learning_rate:g} (the default): teaches a word next to nothing; 1e-3 to 5e-3 are "
            "common for embeddings (docs/textual_inversion.md)"
        )


DECLARATION = Declaration(
    groups={"embedding": EmbeddingOptions},
    rules=(word, cached_texts, learning_rate),
    unused={
        "no_metadata": "for embeddings, whose files have no such metadata",
        "training_comment": "for embeddings, whose files have no such metadata",
    },
)
