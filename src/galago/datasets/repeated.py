"""Several passes over the training images count as one epoch, for sets so small that measuring takes most of the time.

A network is measured, and a checkpoint written, after each epoch. Of a hundred images an epoch is three steps; with
`times` 100 it is three hundred.

    epoch e = passes e·times … e·times + times - 1 of the data within, each with an order and augmentation of its own

When: few images, and trainings that are to be compared by their steps: `times` and `epochs` together make the budget.
It costs nothing. Recipe: recipes/regularize/small_data_cifar10.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from galago.batch import Batch
from galago.data import Data, Loader, Wrapped
from galago.errors import UserError


class OneAfterAnother:
    """A `Loader`: the batches of several.

    Args:
        loaders: in their order.
    """

    def __init__(self, loaders: Sequence[Loader]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Batch]:
        for loader in self.loaders:
            yield from loader


class Repeated(Wrapped):
    """A data set of which one epoch is several passes.

    Args:
        data: any data set.
        times: passes an epoch.
    """

    def __init__(self, data: Data, times: int = 10) -> None:
        if times < 1:
            raise UserError(f"Repeated: times is {times}; give 1 or more passes an epoch")
        super().__init__(data)
        self.times = times

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        self.data.seed = self.seed
        loaders = []
        for number in range(epoch * self.times, (epoch + 1) * self.times):
            whole = self.data.train(number)
            if start < len(whole):
                loaders.append(self.data.train(number, start) if start > 0 else whole)
            start = max(start - len(whole), 0)
        return OneAfterAnother(loaders)
