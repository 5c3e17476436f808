"""The batches of a validation: every held-out image once, in an order that never changes."""

from __future__ import annotations

from collections.abc import Iterator

from library.data.batch import Batch
from library.data.bucketed import BatchRef, Use
from library.data.dataset import TrainingData
from library.data.loader import BatchMaker, Loader, Tokenize
from library.data.validation_split import name_of, seed_of
from library.randomness import key, permutation


class ValidationBatchMaker(BatchMaker):
    """Keys the remaining randomness (noise, a choice of wildcards) by the image alone.

    So an image has the same noise in every validation, in other runs too, and whatever images are added.
    """

    def visit(self, ref: BatchRef, use: Use) -> int:
        dataset = self._datasets[ref.dataset]
        return key(seed_of(dataset.spec, self._seed), "validation", *name_of(dataset.records[use.record]))


class ValidationData:
    """One process's part of the held-out images of a run.

    Args:
        data: of the run, its latents and texts cached if they will be.
        max_batches: of a validation, over all processes.
        equal_counts: all processes have the same number of batches; a process that would be one short repeats the first
            batch, which does not count.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        max_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        equal_counts: bool = False,
    ) -> None:
        self._maker = ValidationBatchMaker(
            data.validation_datasets, seed=data.seed, prior_loss_weight=1.0, conditioning_as=data.conditioning_as
        )
        self._maker.latents = data.maker.latents
        self._maker.texts = data.maker.texts
        found = [
            ref
            for index, dataset in enumerate(data.validation_datasets)
            for ref in dataset.batches(seed_of(dataset.spec, data.seed), 0, index)
        ]
        # in a shuffled order, so that the first ones represent all
        seed = seed_of(data.validation_datasets[0].spec, data.seed)
        order = permutation(len(found), seed, "validation batches")[:max_batches]
        self.image_count = sum(len(found[index].uses) for index in order)
        self._refs = [found[index] for index in order][rank::world_size]
        #: how many of the first batches belong to the validation
        self.counted = len(self._refs)
        if equal_counts and self.counted * world_size < len(order):
            self._refs.append(found[order[0]])
        self._loader: Loader | None = None

    def __len__(self) -> int:
        """Return the number of batches of this process; it may be 0."""
        return len(self._refs)

    def batches(
        self, *, tokenize: Tokenize, num_workers: int, pin_memory: bool = False, persistent: bool = False
    ) -> Iterator[Batch]:
        """Yield the same batches each time; the settings must be the same too.

        Raises:
            UserError: while iterating: an image or cache file that cannot be read; a worker that was killed.
        """
        if self._loader is None:
            self._loader = Loader(
                self._maker,
                tokenize,
                num_workers=min(num_workers, len(self._refs)),
                pin_memory=pin_memory,
                persistent=persistent,
            )
        return self._loader.batches(self._refs)
