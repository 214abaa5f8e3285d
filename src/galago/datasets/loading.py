"""Batches of an epoch by number, loaded by the training process itself or by workers.

A worker makes whole batches, so that what depends on the batch is done where the images are. Errors travel as text:
a user sees a sentence that names the file, not a worker's traceback.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from galago.batch import Batch
from galago.datasets.augmentation import Augmentation, seeds_of
from galago.datasets.source import Source
from galago.errors import UserError

log = logging.getLogger(__name__)


class Epoch(NamedTuple):
    """How the images of an epoch are augmented."""

    augmentation: Augmentation
    seed: int
    number: int


class Loaded(NamedTuple):
    """What a worker hands over: a batch, or why there is none; errors travel as text, without a traceback."""

    batch: Batch | None
    skipped: tuple[str, ...] = ()
    error: str | None = None


class BatchSet(Dataset[Loaded]):
    """The batches of an epoch by number.

    Args:
        source: of raw images.
        chunks: positions of each batch's images.
        classes: how many.
        epoch: says how images are augmented; None leaves them as they are.
    """

    def __init__(self, source: Source, chunks: Sequence[Tensor], classes: int, epoch: Epoch | None = None) -> None:
        self.source, self.chunks, self.classes, self.epoch = source, chunks, classes, epoch

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Loaded:
        try:
            return self.load(self.chunks[number])
        except UserError as error:
            return Loaded(None, error=str(error))

    def load(self, positions: Tensor) -> Loaded:
        """Reads, augments, fits and stacks."""
        kept, images, skipped = self.source.take(positions)
        if not len(kept):
            raise UserError(f"no image of a whole batch can be read; the first: {skipped[0]}")
        if self.epoch is not None:
            augmentation, seed, number = self.epoch
            images = augmentation(images, seeds_of(seed, number, kept))
        target = nn.functional.one_hot(self.source.labels[kept], self.classes).float()
        return Loaded(Batch(self.stack(images), target, {"index": kept}), skipped)

    def stack(self, images: Tensor | list[Tensor]) -> Tensor:
        """Images fitted to the source's shape, N×C×H×W."""
        if not isinstance(images, Tensor):
            images = torch.stack([self._right(self.source.fit(image)) for image in images])
        self._right(images[0])
        return images

    def _right(self, image: Tensor) -> Tensor:
        if tuple(image.shape) != self.source.shape:
            found, wanted = ("×".join(map(str, shape)) for shape in (image.shape, self.source.shape))
            raise UserError(f"augment: it gives images of {found} and must give {wanted}; end it with a crop or resize")
        return image


class Batches:
    """A `Loader`: the batches of an epoch from number `start` on, loaded by workers.

    Args:
        source: of raw images.
        chunks: positions of each batch's images.
        classes: how many.
        workers: processes that load.
        start: batches to leave out; they are not even loaded.
        epoch: says how images are augmented; None leaves them as they are.
    """

    def __init__(
        self,
        source: Source,
        chunks: Sequence[Tensor],
        classes: int,
        workers: int,
        start: int = 0,
        epoch: Epoch | None = None,
    ) -> None:
        self.set, self.numbers = BatchSet(source, chunks, classes, epoch), range(start, len(chunks))
        self.workers = min(workers, len(self.numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Batch]:
        for batch, skipped, error in self._loaded():
            if batch is None:
                raise UserError(error or "an image could not be loaded")
            for reason in skipped:
                say_once(reason)
            yield batch

    def _loaded(self) -> Iterator[Loaded]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # how many workers is the user's choice
            loader = DataLoader(
                self.set,
                batch_size=None,
                sampler=self.numbers,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # its own, or the loader would draw from the global one
            )
            batches = iter(loader)
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "workers: a process that loads images died, most likely for lack of memory (or shared memory);"
                " try fewer workers, or workers: 0"
            ) from error


@cache
def say_once(reason: str) -> None:
    """Tells the user about a file that is left out, the first time only."""
    log.warning("left out: %s", reason)
