"""Static augmentation: a few augmented copies of each training image, made once and then kept.

A mode of Lorenzo Brigato, Luca Iocchi, "A Close Look at Deep Learning with Small Data", ICPR 2020, arXiv:2003.12843.

Usual augmentation is dynamic: another crop and flip in each epoch. Here the training set is the images as they are and
m copies of each, all different and the same throughout.

    epoch = N images + m N augmented copies,  shuffled anew each time

When: to study small data, where the paper's two versions disagree on whether dynamic augmentation helps. An epoch takes
(1 + m) times as long; all images are held in memory. Recipe: recipes/regularize/small_data_static_cifar10.yaml.

Chosen here: m = 4; copies are drawn from a seed of their own, so that runs with different seeds learn from the same
set. What is at place i of the enlarged set is image i mod N; `extra["index"]` is that place.
"""

from __future__ import annotations

import copy

import torch

from galago.data import Loader, Wrapped
from galago.datasets.augmentation import Augmentation
from galago.datasets.degraded import Degraded
from galago.datasets.images import ImageData
from galago.datasets.loading import BatchSet, Epoch
from galago.datasets.source import Pixels, Split, everything
from galago.errors import UserError


def enlarged(split: Split, augmentation: Augmentation, classes: int, copies: int, seed: int) -> Pixels:
    """The images of a split as they are, then `copies` times augmented.

    Args:
        split: of a source.
        augmentation: what makes a copy.
        classes: how many.
        copies: m.
        seed: decides what the copies are.
    """
    epochs = [None, *(Epoch(augmentation, seed, number) for number in range(copies))]
    loaded = [BatchSet(split.source, [], classes, epoch).load(split.positions).batch for epoch in epochs]
    batches = [batch for batch in loaded if batch is not None]
    labels = torch.cat([batch.target for batch in batches]).argmax(1)
    return Pixels(torch.cat([batch.input for batch in batches]), labels)


class FixedCopies(Wrapped):
    """The images of a data set and augmented copies of them, which stay the same.

    Args:
        data: images with one class each, or such a set that is damaged; its augmentation makes the copies.
        copies: of each image, m.
        copies_seed: decides what they are.
    """

    def __init__(self, data: ImageData | Degraded, copies: int = 4, copies_seed: int = 0) -> None:
        if copies < 0:
            raise UserError(f"FixedCopies: copies is {copies}; give 0 or more, usually 4")
        super().__init__(data)
        self.copies, self.copies_seed = copies, copies_seed
        whole = data.damaged if isinstance(data, Degraded) else data
        source = enlarged(whole.training, whole.augmentation, len(self.classes), copies, copies_seed)
        self.fixed, self.images = copy.copy(whole), len(source)
        self.fixed.training, self.fixed.augmentation = everything(source), Augmentation([])

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        self.fixed.seed = self.seed
        return self.fixed.train(epoch, start)
