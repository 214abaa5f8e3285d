"""Images that belong to none of a data set's classes: the promise of a set of them, and another data set as one.

A classifier gives each of them one of its classes; how well it can tell them apart from its own images is measured by
`galago.probes.out_of_distribution`, `odin`, `mahalanobis` and `nearest_neighbors`; `galago.regularize.energy_margin`
trains it to. Images that need no files are in `galago.outside_made_up`.

Chosen here: images of another data set are stretched to the size of the network's (bilinear, antialiased, whole levels
of 0 to 255); grey is repeated in each channel, RGB becomes grey by the weights of Rec. 601. Images for training are
others than those for measuring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data, Loader
from galago.errors import UserError


class Outside(ABC):
    """A set of images from outside a data set.

    Attributes:
        name: a part of the numbers' names, letters, digits and underscores.
        view: a name that says all that decides the test images, apart from the data set that they are outside of.
    """

    name: str
    view: str

    @abstractmethod
    def test(self, data: Data) -> Loader:
        """Raw images of the size that `data` has, uint8; targets are N×K zeros. Nothing is loaded yet."""

    @abstractmethod
    def training(self, data: Data) -> Loader:
        """The same, of other images."""


class Unlabeled:
    """A `Loader` of raw images that belong to no class. Nothing is made before it is iterated.

    Args:
        make: makes each batch's images, N×C×H×W, uint8.
        batches: how many.
        classes: K, columns of the targets, which are all 0.
    """

    def __init__(self, make: Callable[[], Iterable[Tensor]], batches: int, classes: int) -> None:
        self.make, self.batches, self.classes = make, batches, classes

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        for images in self.make():
            yield Batch(images, torch.zeros(len(images), self.classes))


class OtherData(Outside):
    """Another data set's images, stretched to the size of the network's.

    Args:
        name: what the numbers are called by, such as `svhn`; letters, digits and underscores. Outputs may be stored
            under it, so give other images another name.
        data: where the images come from.
    """

    def __init__(self, name: str, data: Data) -> None:
        self.name, self.data, self.view = name, data, f"ood/{name}"

    def test(self, data: Data) -> Loader:
        return self._fitted(self.data.test(), data)

    def training(self, data: Data) -> Loader:
        return self._fitted(self.data.plain(), data)

    def _fitted(self, loader: Loader, data: Data) -> Loader:
        if not len(loader):
            raise UserError(f"OtherData: {self.name} holds no images; leave it out or look at its `data`")

        def make() -> Iterator[Tensor]:
            shape = data.example().shape[1:]
            yield from (fit(batch.input, shape) for batch in loader)

        return Unlabeled(make, len(loader), len(data.classes))


def fit(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Raw images with other channels and another size, uint8.

    Args:
        images: N×C×H×W, uint8.
        shape: C, H and W as they are to be.

    >>> fit(torch.full((1, 1, 2, 2), 7, dtype=torch.uint8), (3, 1, 1)).flatten()
    tensor([7, 7, 7], dtype=torch.uint8)
    """
    images = with_channels(images, shape[0])
    size = (shape[1], shape[2])
    if images.shape[2:] == size:
        return images
    resized = nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images as RGB, or RGB as grey; N×C×H×W, uint8.

    Raises:
        UserError: it is neither.
    """
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.repeat(1, channels, 1, 1)
    if images.shape[1] == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    raise UserError(f"OtherData: images of {images.shape[1]} channels cannot stand for images of {channels}")


def drawing(seed: int, part: int, number: int) -> torch.Generator:
    """What one image is drawn from: `part` 0 is for measuring, 1 for training."""
    start = (2 * seed + part) * 0x9E3779B1  # far apart, in the 32 bits that the generator looks at
    return torch.Generator().manual_seed((start + number) % 2**32)
