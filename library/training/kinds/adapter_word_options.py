"""Options of a new word that is trained beside a network (pivotal tuning), and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.declaration import Declaration, Facts, Finding, Implied, error, idle
from library.config.fields import option
from library.config.paths import no_file


@dataclass(frozen=True)
class WordOptions:
    """A new word beside the network (pivotal tuning)."""

    train_embedding: str | None = option(
        None, "train vectors of this new word too, as written in captions (SD 1.x, 2.x and SDXL)"
    )
    embedding_init_word: str | None = option(None, "known words from which the word starts, e.g. cat")
    embedding_vectors: int = option(1, "number of vectors (tokens) of the word", type=int, unit="tokens", minimum=1)
    embedding_weights: str | None = option(None, "start the word from this embedding file", harmless=True)
    embedding_lr: float | None = option(
        None, "learning rate of the word (as --learning_rate, if not given)", type=float, unit="rate", above=0
    )
    bundle_embedding: bool = option(
        False, "save the word within the network's file, as ComfyUI and A1111 read it, instead of beside it"
    )


_DETAILS = ("embedding_init_word", "embedding_vectors", "embedding_weights", "embedding_lr", "bundle_embedding")


def word(o: Any, facts: Facts) -> Iterator[Finding]:
    own = o.word
    token = own.train_embedding
    if not token:
        return
    if len(token.split()) != 1 or any(letter in token for letter in './\\:*?"<>|'):
        yield error(f"--train_embedding {token!r}: must be one word of letters, digits, - and _")
    if not own.embedding_init_word and not own.embedding_weights:
        yield error(
            "--embedding_init_word: name a known word from which --train_embedding starts, e.g. cat, or a file with "
            "--embedding_weights"
        )
    yield from no_file("embedding_weights", own.embedding_weights)
    room = o.model.max_token_length or 75
    if own.embedding_vectors > room:
        yield error(
            f"--embedding_vectors {own.embedding_vectors}: a caption has {room} tokens, one for each vector; give "
            "fewer (up to 16 is usual), or --max_token_length"
        )
    if o.dataset.cache_text_encoder_outputs or o.dataset.cache_text_encoder_outputs_to_disk:
        yield error(
            "--cache_text_encoder_outputs: not with --train_embedding, which changes the outputs; remove one of them"
        )
    if own.embedding_lr is None and o.optimizer.learning_rate == 0:
        yield error("--embedding_lr: --learning_rate is 0, so give the word of --train_embedding its own, e.g. 1e-3")


@idle(*_DETAILS, reason="without --train_embedding")
def no_word(o: Any) -> bool:
    return not o.word.train_embedding


@idle("embedding_init_word", reason="with --embedding_weights, which hold the vectors")
def vectors_come_from_a_file(o: Any) -> bool:
    return bool(o.word.train_embedding and o.word.embedding_weights)


@idle("embedding_weights", reason="with --resume, whose state holds the vectors")
def vectors_come_from_the_state(o: Any) -> bool:
    return bool(o.word.train_embedding and o.resume.resume)


def _rate(o: Any) -> Implied | None:
    return Implied(o.optimizer.learning_rate, "follows from --learning_rate") if o.word.train_embedding else None


DECLARATION = Declaration(
    groups={"word": WordOptions},
    rules=(word,),
    idle=(no_word, vectors_come_from_a_file, vectors_come_from_the_state),
    follows={"embedding_lr": _rate},
)
