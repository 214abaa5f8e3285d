"""Where batches come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from galago.batch import Batch


class Loader(Protocol):
    """The batches of one epoch, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Normalize(nn.Module):
    """From an image as a camera or file gives it to what a network expects.

    Args:
        mean: of each channel, in units of the image scaled to [0, 1].
        std: of each channel, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """N×C×H×W, uint8 in 0…255 or float in 0…1, to normalized float32 of the same shape."""
        scaled = image if image.is_floating_point() else image.float() / 255
        return (scaled - self.mean) / self.std


class Data(ABC):
    """Loaders for training and validation.

    An epoch is a pure function: `train(epoch, start)` yields the same batches whenever it is asked, however many
    workers load them. That is what makes an interrupted run continue bit for bit.

    Attributes:
        batch_size: images a training step sees (a process, under DDP).
        seed: decides order and augmentation; the trainer sets it to the run's seed.
        classes: a name a class, in the order of the target's columns.
        normalize: from the raw images that loaders yield to what the network sees.
        images: how many the full training set has, every training `index` is below it; None where that is not known.
    """

    batch_size: int
    seed: int = 0
    classes: tuple[str, ...]
    normalize: Normalize
    images: int | None = None

    @abstractmethod
    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        """Shuffled, augmented batches of `epoch`, beginning with batch number `start`."""

    def plain(self) -> Loader:
        """Training images unaugmented, shuffled once and for all; those of `train` where a data set has no others."""
        return self.train()

    @abstractmethod
    def validation(self) -> Loader:
        """Unaugmented batches in a fixed order, for choosing among models."""

    def test(self) -> Loader:
        """Unaugmented batches that no choice was made on; the validation set where there is no other."""
        return self.validation()

    @abstractmethod
    def example(self) -> Tensor:
        """One raw input as the deployed model will see it, 1×C×H×W, uint8."""


class Wrapped(Data):
    """Another data set, changed in part: what a subclass does not say is the other's.

    Args:
        data: the other.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.batch_size, self.classes, self.normalize = data.batch_size, data.classes, data.normalize
        self.images = data.images

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        self.data.seed = self.seed
        return self.data.train(epoch, start)

    def plain(self) -> Loader:
        return self.data.plain()

    def validation(self) -> Loader:
        return self.data.validation()

    def test(self) -> Loader:
        return self.data.test()

    def example(self) -> Tensor:
        return self.data.example()
