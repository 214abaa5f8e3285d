"""Raw images by position, and how a set of them is divided."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from galago.errors import UserError


class Taken(NamedTuple):
    """Some images of a source.

    `images` are uint8, N×C×H×W, or a list of C×H×W of different sizes; `positions` say which ones they are: those
    asked for, but for the ones that could not be read. `skipped` says of each of these why.
    """

    positions: Tensor
    images: Tensor | list[Tensor]
    skipped: tuple[str, ...] = ()


class Source(ABC):
    """Images with their classes, by position; it must survive pickling, for workers.

    Attributes:
        labels: each image's class, N, int64.
        shape: C, H, W as the network sees an image.
    """

    labels: Tensor
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def take(self, positions: Tensor) -> Taken:
        """The raw images at these positions.

        Raises:
            UserError: one cannot be read and is not to be skipped.
        """

    def fit(self, image: Tensor) -> Tensor:
        """A raw or augmented image brought to `shape`; images of one size in memory need nothing."""
        return image


class Pixels(Source):
    """Images of one size, in memory.

    Args:
        images: N×C×H×W, uint8.
        labels: N classes.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.contiguous(), labels.long()
        channels, height, width = images.shape[1:]
        self.shape = (channels, height, width)

    def take(self, positions: Tensor) -> Taken:
        """A copy of these images, N×C×H×W."""
        return Taken(positions, self.images[positions])


class Split(NamedTuple):
    """Part of a source. An image's position in the source is its `extra["index"]`."""

    source: Source
    positions: Tensor


def everything(source: Source) -> Split:
    """All of a source, in order."""
    return Split(source, torch.arange(len(source)))


def rank_in_class(labels: Tensor, seed: int) -> Tensor:
    """Shuffles each class by itself and says at which place each image came: 0, 1, … within its class."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank


def set_aside(split: Split, amount: float, seed: int) -> tuple[Split, Split]:
    """Sets images aside, the same share of every class up to rounding, the same ones for the same seed.

    Args:
        split: what to divide.
        amount: below 1 a share, from 1 on a number of images.
        seed: decides which.

    Returns:
        What stays and what was set aside, each in the original order.

    >>> labels = torch.tensor([0] * 8 + [1] * 4)
    >>> stays, aside = set_aside(everything(Pixels(torch.zeros(12, 1, 2, 2).byte(), labels)), 0.25, seed=0)
    >>> labels[aside.positions].tolist()
    [0, 0, 1]

    Raises:
        UserError: nothing would be set aside, or nothing would stay.
    """
    labels = split.source.labels[split.positions]
    count = round(amount * len(labels)) if amount < 1 else int(amount)
    if not 0 < count < len(labels):
        raise UserError(f"hold_out: {amount:g} of {len(labels)} images would set aside {count}; choose another amount")
    share = (rank_in_class(labels, seed) + 0.5) / torch.bincount(labels)[labels]
    aside = torch.zeros(len(labels), dtype=torch.bool)
    aside[share.argsort(stable=True)[:count]] = True
    return split._replace(positions=split.positions[~aside]), split._replace(positions=split.positions[aside])


def few(split: Split, per_class: int, seed: int) -> Split:
    """At most this many images of each class, in the original order, the same ones for the same seed.

    With a larger number the same images and further ones are chosen.
    """
    if per_class < 1:
        raise UserError(f"per_class: {per_class} images of each class is too few; give at least 1, or null for all")
    labels = split.source.labels[split.positions]
    return split._replace(positions=split.positions[rank_in_class(labels, seed) < per_class])
