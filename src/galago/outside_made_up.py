"""Images from outside any data set, made up on the spot: noise, blobs, and the set's own with their pixels in disorder.

As in Dan Hendrycks, Mantas Mazeika, Thomas Dietterich, "Deep Anomaly Detection with Outlier Exposure", ICLR 2019,
arXiv:1812.04606 (recalled).

    gaussian     each value from N(0.5, 1), cut to [0, 1]          permuted   own images, the pixels of each shuffled
    uniform      each value from U(0, 1)                           blobs      smooth noise, cut at its median: 0 or 1
    rademacher   each value 0 or 1, evenly

An image is decided by the seed, its number and its shape: asking for more images leaves the first as they are.

Chosen here: all values become whole levels, 0 to 255, as files take them; blobs are noise of each channel smoothed by a
Gaussian of 2 pixels; a pixel keeps its colors when it is moved.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from galago.data import Data, Loader
from galago.errors import UserError
from galago.outside import Outside, Unlabeled, drawing


class MadeUp(Outside, ABC):
    """Images drawn on the spot. Abstract: a subclass draws one.

    Args:
        images: how many.
        seed: decides which.
    """

    def __init__(self, images: int = 2000, seed: int = 0) -> None:
        if images < 1:
            raise UserError(f"{type(self).__name__}: images is {images}; give 1 or more, 2000 is usual")
        self.images, self.seed = images, seed
        self.name = type(self).__name__.lower()
        self.view = f"ood/{self.name}/{images}/{seed}"

    @abstractmethod
    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """One image C×H×W, float, in [0, 1]."""

    def test(self, data: Data) -> Loader:
        return self._drawn(data, 0)

    def training(self, data: Data) -> Loader:
        return self._drawn(data, 1)

    def _drawn(self, data: Data, part: int) -> Loader:
        def make() -> Iterator[Tensor]:
            shape = data.example().shape[1:]
            for start in range(0, self.images, data.batch_size):
                numbers = range(start, min(start + data.batch_size, self.images))
                drawn = torch.stack([self.draw(shape, drawing(self.seed, part, number)) for number in numbers])
                yield (255 * drawn).round().to(torch.uint8)

        return Unlabeled(make, math.ceil(self.images / data.batch_size), len(data.classes))


class Gaussian(MadeUp):
    """Each value from a normal distribution around 0.5 with standard deviation 1, cut to [0, 1].

    Args:
        images: how many.
        seed: decides which.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return (0.5 + torch.randn(shape, generator=generator)).clamp(0, 1)


class Uniform(MadeUp):
    """Each value evenly from [0, 1].

    Args:
        images: how many.
        seed: decides which.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator)


class Rademacher(MadeUp):
    """Each value 0 or 1, evenly.

    Args:
        images: how many.
        seed: decides which.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randint(2, shape, generator=generator).float()


class Blobs(MadeUp):
    """Rounded shapes with sharp edges: half of each channel is 0, the other half 1.

    Args:
        images: how many.
        seed: decides which.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        noise = smooth(torch.randn(shape, generator=generator), 2.0).flatten(1)
        return (noise > noise.median(1, keepdim=True).values).float().view(shape)


class Permuted(Outside):
    """The data set's own images, the pixels of each in a random order.

    Args:
        seed: decides the orders.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.name, self.view = seed, "permuted", f"ood/permuted/{seed}"

    def test(self, data: Data) -> Loader:
        return self._shuffled(data.test(), len(data.classes), 0)

    def training(self, data: Data) -> Loader:
        return self._shuffled(data.plain(), len(data.classes), 1)

    def _shuffled(self, loader: Loader, classes: int, part: int) -> Loader:
        def make() -> Iterator[Tensor]:
            number = 0
            for batch in loader:
                places = range(number, number + len(batch.input))
                generators = [drawing(self.seed, part, place) for place in places]
                yield torch.stack([shuffled(*pair) for pair in zip(batch.input, generators, strict=True)])
                number += len(batch.input)

        return Unlabeled(make, len(loader), classes)


def made_up() -> list[Outside]:
    """The five sets that need no files."""
    return [Gaussian(), Uniform(), Rademacher(), Permuted(), Blobs()]


def chosen(outside: Sequence[Outside] | None, whose: str) -> list[Outside]:
    """The given sets, or the five that need no files.

    Raises:
        UserError: there are none, two have one name, or a name cannot be a part of a number's.
    """
    sets = made_up() if outside is None else list(outside)
    names = [one.name for one in sets]
    if not sets:
        raise UserError(f"{whose}: outside is empty; name at least one set, or leave it out for five made-up ones")
    for name in names:
        if name == "mean" or not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise UserError(f"{whose}: {name!r} is no name for a set of `outside`; use letters, digits, underscores")
        if names.count(name) > 1:
            raise UserError(f"{whose}: two sets of `outside` are called {name!r}; list each once")
    return sets


def shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    """An image C×H×W with its pixels in another order, each with its colors."""
    order = torch.randperm(image[0].numel(), generator=generator)
    return image.flatten(1)[:, order].view(image.shape)


def smooth(image: Tensor, sigma: float) -> Tensor:
    """An image C×H×W behind a Gaussian filter; what lies beyond an edge is as the edge is.

    >>> smooth(torch.ones(1, 3, 5), 2.0).allclose(torch.ones(1, 3, 5))
    True
    """
    radius = math.ceil(3 * sigma)
    weights = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma**2))
    kernel = (weights / weights.sum()).view(1, 1, 1, -1)
    padded = nn.functional.pad(image[:, None], [radius] * 4, mode="replicate")
    return nn.functional.conv2d(nn.functional.conv2d(padded, kernel), kernel.mT)[:, 0]
