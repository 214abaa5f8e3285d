"""Images with one class each: what every classification data set shares.

A concrete data set says where its raw images come from (`Source`) and which augmentation is usual for it; order,
augmentation, batches, workers and the share of each process are done here, as a pure function of (seed, epoch).

Under `torch.distributed` every process is given each `world`-th image of a training epoch, the same number of
batches each; validation and test sets are given whole to every process, so that what is measured on them needs no
communication and counts no image twice.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data, Loader, Normalize
from galago.datasets.augmentation import Augmentation, mix, seeds_of
from galago.datasets.balance import class_batches, require_groups
from galago.datasets.loading import Batches, Epoch
from galago.datasets.source import Source, Split, everything, few, set_aside
from galago.errors import UserError


class Sources(NamedTuple):
    """Where images come from; what is missing is replaced as `ImageData` says."""

    training: Source
    validation: Source | None = None
    test: Source | None = None


class ImageData(Data, ABC):
    """Image classification. Abstract: a concrete data set gives the sources.

    Args:
        sources: of training, validation and test images.
        classes: a name a class.
        mean: of each channel, in units of the image scaled to [0, 1].
        std: of each channel, likewise.
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        hold_out: training images set aside for validation: below 1 a share, from 1 on a number; 0 for none. Without
            any, validation uses the validation source, or else the test source.
        split_seed: decides which images are set aside and which are kept by `per_class`. Apart from the run's seed,
            so that a student never validates on what its teacher has seen.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order.
        together: images of one class that each training batch holds together, of batch_size / together classes, for
            losses that compare images; None for batches of any images.

    Attributes:
        images: how many the full training set has; every training `index` is below it.
    """

    def __init__(
        self,
        sources: Sources,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        workers: int,
        hold_out: float,
        split_seed: int,
        per_class: int | None,
        augment: Sequence[nn.Module],
        together: int | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
        self.classes, self.mean, self.std = tuple(classes), mean, std
        self.batch_size, self.workers = batch_size, workers
        self.hold_out, self.split_seed, self.per_class, self.together = hold_out, split_seed, per_class, together
        self.images = len(sources.training)
        _check_labels(sources, self.classes)
        self.normalize = _normalization(mean, std, sources.training.shape[0])
        self.augmentation = Augmentation(augment)
        self.training, self.validating, self.testing = self._divide(sources)
        if together is not None:
            require_groups(_labels(self.training), batch_size, together, self.classes)

    def _divide(self, sources: Sources) -> tuple[Split, Split, Split]:
        training = everything(sources.training)
        other = sources.test if sources.validation is None else sources.validation
        if self.hold_out > 0:
            training, validation = set_aside(training, self.hold_out, self.split_seed)
        elif other is not None:
            validation = everything(other)
        else:
            raise UserError(
                "there are no images for validation; set some aside with hold_out, for example hold_out: 0.2"
            )
        if self.per_class is not None:
            training = few(training, self.per_class, self.split_seed)
        return training, validation, validation if sources.test is None else everything(sources.test)

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        """Shuffled, augmented batches of `epoch`, beginning with batch number `start`.

        All batches are full: what is left over at the end of an epoch is another part of the set each time.

        Raises:
            UserError: there are fewer images than one batch needs.
        """
        rank, world = _place()
        chunks = self._chunks(epoch, rank, world)
        if not chunks:
            raise UserError(
                f"batch_size: {len(self.training.positions)} training images are not enough for one batch of"
                f" {self.batch_size}{f' in each of {world} processes' if world > 1 else ''}; make batch_size smaller"
            )
        how = Epoch(self.augmentation, self.seed, epoch)
        return Batches(self.training.source, chunks, len(self.classes), self.workers, start, how)

    def _chunks(self, epoch: int, rank: int, world: int) -> list[Tensor]:
        """The positions of each batch of this process; as many batches in every one."""
        order = shuffled(self.training.positions, self.seed, epoch)
        if self.together is None:
            return batched(order[rank::world], self.batch_size)[: len(order) // (self.batch_size * world)]
        labels = self.training.source.labels[order]
        places = class_batches(labels, self.batch_size, self.together, drawing(self.seed, epoch, 1))
        return [order[chunk] for chunk in places[rank::world][: len(places) // world]]

    def plain(self) -> Loader:
        """Unaugmented batches of all training images in a shuffled order, the same ones for the same `split_seed`."""
        return self._plain(self.training._replace(positions=shuffled(self.training.positions, self.split_seed, 0)))

    def validation(self) -> Loader:
        """Unaugmented batches in a fixed order, all of them in every process."""
        return self._plain(self.validating)

    def test(self) -> Loader:
        """Unaugmented batches of the test set, or of the validation set where there is no other."""
        return self._plain(self.testing)

    def _plain(self, split: Split) -> Loader:
        chunks = batched(split.positions, self.batch_size)
        return Batches(split.source, chunks, len(self.classes), self.workers)

    def example(self) -> Tensor:
        """The first validation image that can be read, 1×C×H×W, uint8."""
        chunks = batched(self.validating.positions, 8)
        return next(iter(Batches(self.validating.source, chunks, len(self.classes), workers=0))).input[:1]


def shuffled(positions: Tensor, seed: int, epoch: int) -> Tensor:
    """The order of an epoch."""
    return positions[torch.randperm(len(positions), generator=drawing(seed, epoch, 0))]


def drawing(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """What an epoch's order (purpose 0) and the classes of its batches (1) are drawn from."""
    number = int(mix(seeds_of(seed, epoch, torch.tensor([purpose])))[0] >> 1)
    return torch.Generator().manual_seed(number)


def batched(positions: Tensor, size: int) -> list[Tensor]:
    """Consecutive parts of this size; the last may be smaller."""
    return [positions[first : first + size] for first in range(0, len(positions), size)]


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _labels(split: Split) -> Tensor:
    return split.source.labels[split.positions]


def _normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> Normalize:
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"mean and std must have a number for each of {channels} channels, not {len(mean)} and {len(std)}"
        )
    if min(std) <= 0:
        raise UserError(f"std must be above 0, not {list(std)}")
    return Normalize(mean, std)


def _check_labels(sources: Sources, classes: Sequence[str]) -> None:
    for source in sources:
        if (
            source is not None
            and len(source)
            and not 0 <= int(source.labels.min()) <= int(source.labels.max()) < len(classes)
        ):
            found = f"{int(source.labels.min())} to {int(source.labels.max())}"
            raise UserError(f"labels run from {found} but there are {len(classes)} classes: {', '.join(classes[:12])}")
