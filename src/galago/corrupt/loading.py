"""Corrupted batches: a loader's images, changed on their way."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from galago.batch import Batch
from galago.corrupt.corruption import Corruption
from galago.data import Loader
from galago.probe import spread


class Numbered:
    """A `Loader` whose images all have an `index`: their own, or their place where the data set gives none.

    Args:
        loader: of batches.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        first = 0
        for batch in self.loader:
            places = torch.arange(first, first + len(batch.input))
            first += len(batch.input)
            yield batch._replace(extra={"index": places} | batch.extra)


class Thinned:
    """A `Loader` of some of the images, spread evenly over the set.

    Args:
        loader: of batches.
        images: how many.
    """

    def __init__(self, loader: Loader, images: int) -> None:
        self.loader, self.images = loader, images

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        yield from spread(Numbered(self.loader), self.images)


class CorruptedBatches:
    """A `Loader` whose images are corrupted; what is drawn for an image is decided by its `index`.

    Args:
        loader: of raw images.
        corruption: what is done to them.
        severity: 1 to 5.
    """

    def __init__(self, loader: Loader, corruption: Corruption, severity: int) -> None:
        self.loader, self.corruption, self.severity = loader, corruption, severity

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in Numbered(self.loader):
            changed = self.corruption(batch.input, self.severity, batch.extra["index"].tolist())
            yield batch._replace(input=changed)
