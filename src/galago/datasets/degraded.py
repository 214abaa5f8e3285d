"""Damaged training sets, to see what a method is worth there: labels that are wrong, classes that are rare.

Fahad Sarfraz, Elahe Arani, Bahram Zonooz, "Knowledge Distillation Beyond Model Compression", ICPR 2020,
arXiv:2007.01922, tests distillation so.

*Label noise* at rate r: with probability r an image's label is drawn anew, uniformly over the K classes, so that a
share of r (1 - 1/K) is wrong. *Imbalance* by the factor f: of class c, in a shuffled order, n f^(-c/(K-1)) images are
kept, where n is the size of the smallest class: the largest class keeps f times as many as the smallest. *Given labels*
are read from a file: those of CIFAR-10N, say, where people were wrong as people are (Jiaheng Wei and others, "Learning
with Noisy Labels Revisited: A Study Using Real-World Human Annotations", ICLR 2022, arXiv:2110.12088).

What is damaged is the same for the same seed, whatever the run's own seed, and in training images only: validation on
images that were set aside and the test stay as they are. A teacher for a study learns on the same damage: give its
recipe the same `data`. From the noisy labels a per-image method (one that goes by `extra["index"]`) sees nothing else.

When: to compare methods, or to practice for data that one knows to be so.
Recipes: recipes/distill/noise_kd_resnet20_cifar10.yaml, recipes/distill/imbalance_kd_resnet20_cifar10.yaml,
recipes/regularize/slr_human_resnet20_cifar10.yaml. The study's
own grid is not known; usual, and chosen here, are rates of 0.2, 0.4 and 0.6 and factors of 10, 50 and 100 (with the
exponential profile).
"""

from __future__ import annotations

import copy
import zipfile
from abc import ABC
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from galago.data import Loader, Wrapped
from galago.datasets.images import ImageData
from galago.datasets.source import Source, Split, Taken, rank_in_class
from galago.errors import UserError


def noisy_labels(labels: Tensor, classes: int, rate: float, seed: int) -> Tensor:
    """Labels of which a share is drawn anew.

    Args:
        labels: N classes.
        classes: K.
        rate: probability that a label is drawn anew, over all K classes.
        seed: decides which and what.

    >>> noisy_labels(torch.arange(3), 3, rate=0.0, seed=1)
    tensor([0, 1, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < rate, drawn, labels)


def kept_of_classes(sizes: Tensor, factor: float, seed: int) -> Tensor:
    """How many images of each class an exponential profile keeps; which class comes where is shuffled.

    Args:
        sizes: of the K classes.
        factor: the largest class over the smallest.
        seed: decides the order of the classes.

    >>> kept_of_classes(torch.tensor([100, 100, 100]), factor=100.0, seed=0).sort().values
    tensor([  1,  10, 100])
    """
    classes = len(sizes)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    profile = int(sizes.min()) * factor ** -(order.double() / max(classes - 1, 1))
    return profile.round().clamp(min=1).long()


class Relabeled(Source):
    """Another source's images with labels of their own.

    Args:
        source: of the images.
        labels: N classes.
    """

    def __init__(self, source: Source, labels: Tensor) -> None:
        self.source, self.labels, self.shape = source, labels, source.shape

    def take(self, positions: Tensor) -> Taken:
        return self.source.take(positions)

    def fit(self, image: Tensor) -> Tensor:
        return self.source.fit(image)


class Degraded(Wrapped, ABC):
    """A data set with another training set. Abstract: what is done to it is a subclass's matter.

    Args:
        data: images with one class each, or such a set that is damaged already.
        damage_seed: decides what is damaged.
    """

    def __init__(self, data: ImageData | Degraded, damage_seed: int = 0) -> None:
        super().__init__(data)
        self.damage_seed = damage_seed
        self.damaged: ImageData = copy.copy(data.damaged if isinstance(data, Degraded) else data)

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        self.damaged.seed = self.seed
        return self.damaged.train(epoch, start)

    def plain(self) -> Loader:
        return self.damaged.plain()


class NoisyLabels(Degraded):
    """Some training labels are drawn anew, once and for all.

    Args:
        data: images with one class each, or such a set that is damaged already.
        rate: probability that a label is drawn anew, uniformly over all classes.
        damage_seed: decides which labels, and what they become.
    """

    def __init__(self, data: ImageData | Degraded, rate: float, damage_seed: int = 0) -> None:
        super().__init__(data, damage_seed)
        if not 0 <= rate <= 1:
            raise UserError(f"NoisyLabels: rate is {rate}; give a share from 0 to 1")
        self.rate = rate
        source, positions = self.damaged.training
        labels = noisy_labels(source.labels, len(data.classes), rate, damage_seed)
        self.damaged.training = Split(Relabeled(source, labels), positions)


def read_labels(file: Path, key: str | None) -> Tensor:
    """Whole numbers of a NumPy file. N, int64.

    Args:
        file: `.npy`, or `.npz` with one array or with one of this name.
        key: the array's name in `.npz`.

    Raises:
        UserError: the file or the array is not there, or holds something else.
    """
    try:
        with file.open("rb") as opened:
            content = np.load(opened, allow_pickle=False)
            if isinstance(content, np.lib.npyio.NpzFile):
                names = content.files
                name = names[0] if key is None and len(names) == 1 else key
                if name not in names:
                    raise UserError(f"GivenLabels: key is {key}; {file} holds {', '.join(names)}")
                content = content[name]
    except FileNotFoundError as error:
        raise UserError(f"GivenLabels: there is no file {file}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"GivenLabels: {file} is no NumPy file of numbers: {error}") from error
    if content.ndim != 1 or content.dtype.kind not in "iu":
        raise UserError(
            f"GivenLabels: {file} holds {content.dtype} of shape {content.shape}; give one whole number an image"
        )
    return torch.from_numpy(content.astype(np.int64))


class GivenLabels(Degraded):
    """Training labels come from a file, such as those that people gave.

    Args:
        data: images with one class each, or such a set that is damaged already.
        file: `.npy` or `.npz`, a class for each training image, in the order of the data set (an image's `index`).
        key: which array of `.npz`, where it holds several.
    """

    def __init__(self, data: ImageData | Degraded, file: str, key: str | None = None) -> None:
        super().__init__(data)
        self.file, self.key = file, key
        source, positions = self.damaged.training
        labels, classes = read_labels(Path(file), key), len(data.classes)
        if len(labels) != len(source.labels):
            raise UserError(
                f"GivenLabels: {file} holds {len(labels)} labels; this data set has {len(source.labels)} images for"
                " training"
            )
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise UserError(
                f"GivenLabels: {file} holds {int(labels.min())} to {int(labels.max())}; classes are 0 to {classes - 1}"
            )
        self.damaged.training = Split(Relabeled(source, labels), positions)


class Imbalanced(Degraded):
    """Some classes have few training images, others many.

    Args:
        data: images with one class each, or such a set that is damaged already.
        factor: how many times as many images the largest class keeps as the smallest; 1 makes all as large as the
            smallest class is.
        damage_seed: decides which classes are rare, and which of their images are kept.
    """

    def __init__(self, data: ImageData | Degraded, factor: float, damage_seed: int = 0) -> None:
        super().__init__(data, damage_seed)
        source, positions = self.damaged.training
        labels = source.labels[positions]
        sizes = torch.bincount(labels, minlength=len(data.classes))
        if not 1 <= factor <= int(sizes.min()):
            raise UserError(
                f"Imbalanced: factor is {factor:g}; the smallest class has {int(sizes.min())} images,"
                " so give a factor from 1 to that"
            )
        self.factor = factor
        kept = rank_in_class(labels, damage_seed) < kept_of_classes(sizes, factor, damage_seed)[labels]
        self.damaged.training = Split(source, positions[kept])
