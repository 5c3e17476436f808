"""Encode captions once: which ones a run may need, encoding in batches, and reading for a batch.

A caption here is the final one, with prefix, suffix and wildcards. Where captions change at each use, ``variants`` of
them are drawn for each image, keyed by its name and not by the run's seed, so that files serve later runs too. A use
takes the variant that its visit's key chooses. A dropped caption is no variant: the empty caption is encoded too, and
the same uses drop their caption as without a cache.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from library.architectures.formats import TextFormat
from library.architectures.ragged import PackedRows, joined, trimmed
from library.data.captions import CaptionRules, is_dropped, written_caption
from library.data.latent_encoding import THREADS
from library.data.records import ImageRecord
from library.data.text_cache_format import (
    Row,
    TextSettings,
    TextStamp,
    read_row,
    read_stamp,
    text_path,
    write_texts,
)
from library.errors import UserError
from library.randomness import python_rng

logger = logging.getLogger(__name__)

Captioned = Iterable[tuple[ImageRecord, CaptionRules]]
Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]
Report = Callable[[int, int], None]


# ---- which captions ----


def variant_count(rules: CaptionRules, variants: int) -> int:
    """Return the number of encoded captions of an image, without the dropped one."""
    return variants if rules.is_written_anew else 1


def variant_caption(record: ImageRecord, rules: CaptionRules, index: int) -> str:
    return written_caption(record.caption, rules, rng=python_rng("caption variant", record.name, index))


@dataclass(frozen=True)
class TextFile:
    """A cache file that a run needs."""

    path: Path
    captions: tuple[str, ...]


def wanted_files(captioned: Captioned, format: TextFormat, variants: int) -> list[TextFile]:
    """Return all files of a run, each with every caption that any subset has for it."""
    wanted: dict[Path, dict[str, None]] = {}
    for record, rules in captioned:
        captions = [variant_caption(record, rules, index) for index in range(variant_count(rules, variants))]
        for caption in [*captions, ""] if rules.drops else captions:
            wanted.setdefault(text_path(record.path, caption, format), {})[caption] = None
    return [TextFile(path, tuple(captions)) for path, captions in wanted.items()]


def find_outdated(
    wanted: Sequence[TextFile], format: TextFormat, settings: TextSettings, *, trust: bool
) -> list[TextFile]:
    """Return files that are missing or unusable; warnings name damaged ones and count others by reason.

    Args:
        trust: take what is there without looking into it (``--skip_cache_check``).
    """
    if trust:
        return [file for file in wanted if not file.path.exists()]
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = list(pool.map(lambda file: _why_not(file, format, settings), wanted))
    outdated = [(file, reason) for file, reason in zip(wanted, reasons, strict=True) if reason is not None]
    for reason, count in Counter(reason for _, reason in outdated if reason).items():
        example = next(file.path for file, other in outdated if other == reason)
        logger.warning("text encoder outputs: %s, and made again: %d files, such as %s", reason, count, example)
    return [file for file, _ in outdated]


def _why_not(file: TextFile, format: TextFormat, settings: TextSettings) -> str | None:
    """Return why a file cannot be used, "" if that was reported or needs no message; ``None`` if it can."""
    try:
        stamp = read_stamp(file.path, format)
    except FileNotFoundError:
        return ""
    except ValueError as error:
        logger.warning("%s and made again", error)
        return ""
    if stamp is None:
        return "of another program, not telling for which captions (--skip_cache_check would trust it)"
    return stamp.outdated(file.captions, settings)


# ---- encoding ----


@dataclass(frozen=True)
class TextEncoding:
    """Turns captions into conditioning."""

    tokenize: Tokenize
    encode: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # outputs on any device, batch first
    dtype: torch.dtype
    batch_size: int
    ragged: Mapping[str, str] = field(default_factory=dict)  # see ``TextFormat``

    def rows(self, captions: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Encode captions in batches; yields conditioning on the host.

        A batch is tokenized ahead, and sent to the device before the outputs of the previous one are awaited.

        Raises:
            UserError: outputs that are not finite.
        """
        batches = [captions[start : start + self.batch_size] for start in range(0, len(captions), self.batch_size)]
        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(self.tokenize, batch) for batch in batches[:2])
            upcoming = iter(batches[2:])
            running: tuple[Sequence[str], Mapping[str, Tensor]] | None = None
            for batch in batches:
                tokens = ahead.popleft().result()
                if (following := next(upcoming, None)) is not None:
                    ahead.append(pool.submit(self.tokenize, following))
                started = self.encode(tokens)
                if running is not None:
                    yield from self._fetch(*running)
                running = batch, started
            if running is not None:
                yield from self._fetch(*running)

    def _fetch(self, batch: Sequence[str], started: Mapping[str, Tensor]) -> Iterator[tuple[str, Row]]:
        outputs = {
            name: values.to(device="cpu", dtype=self.dtype if values.is_floating_point() else None)
            for name, values in started.items()
        }
        for place, caption in enumerate(batch):
            own = trimmed({name: values[place] for name, values in outputs.items()}, self.ragged)
            # a copy, as a view would keep the whole batch in memory
            row = {name: values.clone() for name, values in own.items()}
            if not all(values.isfinite().all() for values in row.values()):
                raise UserError(
                    f"caption {caption[:80]!r}: the text encoder gives values that are not finite; use "
                    "--mixed_precision bf16 or no"
                )
            yield caption, row


def encode_to_disk(
    files: Sequence[TextFile], encoding: TextEncoding, format: TextFormat, settings: TextSettings, report: Report
) -> None:
    """Encode what files hold, each distinct caption once, and write them behind the encoding.

    Raises:
        UserError: outputs that are not finite; a full disk.
    """
    uses = Counter(caption for file in files for caption in file.captions)
    known: dict[str, Row] = {}
    waiting = deque(files)
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer:
        for caption, row in encoding.rows(list(uses)):
            known[caption] = row
            # captions come in the order of the files, so the first is complete first
            while waiting and all(c in known for c in waiting[0].captions):
                file = waiting.popleft()
                rows = [known[c] for c in file.captions]
                writes.append(
                    writer.submit(write_texts, file.path, rows, TextStamp.of(file.captions, settings), format)
                )
                uses.subtract(file.captions)
                for c in file.captions:
                    if not uses[c]:
                        del known[c]
                report(len(files) - len(waiting), len(files))
                while writes[0].done() or len(writes) > 4 * encoding.batch_size:
                    writes.popleft().result()
                    if not writes:
                        break
        for write in writes:
            write.result()


# ---- handing out ----


class DiskTexts:
    """Conditioning in cache files, read on use."""

    def __init__(self, format: TextFormat, dtype: torch.dtype, *, trust: bool) -> None:
        self._format = format
        self.ragged = format.ragged
        self._dtype = dtype
        self._trust = trust

    def get(self, image: Path, caption: str, place: int) -> Row:
        """Return the conditioning of an image's caption, its ``place``-th variant.

        Raises:
            UserError: the file vanished or was changed since it was checked.
        """
        path = text_path(image, caption, self._format)
        try:
            row = read_row(path, caption, place, self._format, trust=self._trust)
        except ValueError as error:
            raise UserError(f"{error}; start again without --skip_cache_check to make it anew") from None
        if row is None:
            raise UserError(
                f"{path}: has no output for the caption {caption[:80]!r}; start again without --skip_cache_check to "
                "make it anew"
            )
        return {name: v.to(self._dtype) if v.is_floating_point() else v for name, v in row.items()}


class MemoryTexts:
    """Conditioning in memory, one tensor per name, which loader workers share however they are started.

    Args:
        ragged: see ``TextFormat``.
    """

    def __init__(self, captions: Iterable[str], ragged: Mapping[str, str] = MappingProxyType({})) -> None:
        self._places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
        self._stacks: dict[str, Tensor] = {}
        self.ragged = dict(ragged)
        self._packed: dict[str, PackedRows] = {}

    @property
    def captions(self) -> list[str]:
        return list(self._places)

    def put(self, caption: str, row: Row) -> None:
        for name, values in trimmed(row, self.ragged).items():
            if name in self.ragged:
                self._packed.setdefault(name, PackedRows(len(self._places))).put(self._places[caption], values)
                continue
            if name not in self._stacks:
                self._stacks[name] = values.new_empty(len(self._places), *values.shape)
            self._stacks[name][self._places[caption]] = values

    def complete(self) -> None:
        """Pack the rows; called when all captions were put."""
        for rows in self._packed.values():
            rows.pack()

    def get(self, image: Path, caption: str, place: int) -> Row:
        """Return the encoding of a caption; see ``DiskTexts.get``."""
        index = self._places[caption]
        whole = {name: stack[index] for name, stack in self._stacks.items()}
        return {**whole, **{name: rows.get(index) for name, rows in self._packed.items()}}


@dataclass(frozen=True)
class CachedTexts:
    """Cached captions, as a batch maker uses them."""

    store: DiskTexts | MemoryTexts
    variants: int
    #: whether only some encoders are cached, so that captions are tokenized for the others
    in_part: bool = False

    def sample(self, record: ImageRecord, rules: CaptionRules, *, epoch: int, visit: int) -> tuple[str, Row]:
        """Return caption and conditioning of one use; a function of image, rules and visit.

        Raises:
            UserError: a cache file vanished or was changed.
        """
        if is_dropped(rules, epoch=epoch, rng=python_rng(visit, "caption")):
            return "", self.store.get(record.path, "", 0)
        count = variant_count(rules, self.variants)
        place = python_rng(visit, "caption variant").randrange(count) if count > 1 else 0
        caption = variant_caption(record, rules, place)
        return caption, self.store.get(record.path, caption, place)


def stack_rows(rows: Sequence[Row], paths: Sequence[Path], ragged: Collection[str] = frozenset()) -> dict[str, Tensor]:
    """Stack rows to tensors with a batch axis; those named in ``ragged`` are padded to the longest.

    Raises:
        UserError: files that were trusted hold outputs of different sizes.
    """
    try:
        return {
            name: joined([row[name][None] for row in rows]) if name in ragged else torch.stack([r[name] for r in rows])
            for name in rows[0]
        }
    except RuntimeError:
        names = ", ".join(str(path) for path in paths)
        raise UserError(
            f"{names}: their cached text encoder outputs have different sizes; start again without "
            "--skip_cache_check to make them anew"
        ) from None
