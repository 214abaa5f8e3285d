"""A training set that grows: training begins on a part of the images, and more come in stages.

Shitala Prasad, Dongyun Lin, Yiqun Li, Sheng Dong, Zaw Min Oo, "Rethinking of Deep Models Parameters with Respect to
Data Distribution", ICPR 2020 (no public code found).

Early epochs, which learn what is coarse, do not need all images, and new ones come when a network has had enough of the
old. Learning rate and batch size go by how many there are.

    stage s of S:  E_s epochs on D_1 ⊂ D_2 ⊂ … ⊂ D_S,  ⌊φ_s n_c + 1/2⌋ images of each class c,  φ_S = 1
    noise of a step ~ η n / b:  learning rate, images, images a batch
    constant noise   b_s = max(16, 8 ⌊b_S φ_s / 8 + 1/2⌋),  η_s = η_S
    warm restarts    b_s = b_S,  η_s = η_S sqrt(φ_s), which falls to a tenth by half a cosine within each stage
    computation      C = Σ φ_s E_s, in epochs of the full set

When: to save computation: the usual setting takes 0.875 of the epochs that it replaces. Compare methods by the images
that they have processed, not by epochs. Small first stages are learned by heart quickly, so keep augmentation on.

Usual setting: for E epochs, φ = (0.25, 0.5, 0.75, 1) and E_s = (0.25, 0.25, 0.25, 0.5) E; the defaults are those of
E = 100. `epochs` of the recipe is their sum. Constant noise is `smaller_batches: true` with
`galago.datasets.growing.ConstantNoise` as schedule, warm restarts is `galago.datasets.growing.WarmRestarts` alone.
Recipes: recipes/regularize/growing_resnet20_cifar10.yaml and recipes/regularize/growing_noise_resnet20_cifar10.yaml.

Only the abstract of the paper could be had. It says that the data grow step by step, with learning rate and batch size
tuned to them; the relation is general knowledge (recalled), formulas and numbers are chosen here:

- Constant noise lets the learning rate fall in the last stage, by half a cosine to 0, as warm restarts do.
- All batches are full, as in every data set here: fewer than a batch's images of a stage wait for its next epoch.
- Weights, BatchNorm and the optimizer's state go on from stage to stage. One stage with all images is training as ever.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from galago.console import say
from galago.data import Loader, Wrapped
from galago.datasets.degraded import Degraded
from galago.datasets.images import ImageData
from galago.datasets.source import rank_in_class
from galago.errors import UserError
from galago.schedule import Cosine, Schedule


def stage_counts(sizes: Tensor, fraction: float) -> Tensor:
    """`⌊φ n_c + 1/2⌋` of each class.

    >>> stage_counts(torch.tensor([500, 61, 8]), 0.25)
    tensor([125,  15,   2])
    """
    return (fraction * sizes.double() + 0.5).floor().long()


def stage_batch(full: int, fraction: float) -> int:
    """`max(16, 8 ⌊b φ / 8 + 1/2⌋)`, and never more than the full set has.

    >>> stage_batch(128, 0.25), stage_batch(128, 0.1), stage_batch(12, 1.0)
    (32, 16, 12)
    """
    return min(full, max(16, 8 * math.floor(full * fraction / 8 + 0.5))) if fraction < 1 else full


def full_epochs(epochs: Sequence[int], fractions: Sequence[float]) -> float:
    """C, what the stages cost in epochs of the full set.

    >>> full_epochs([25, 25, 25, 50], [0.25, 0.5, 0.75, 1.0])
    87.5
    """
    return sum(fraction * count for count, fraction in zip(epochs, fractions, strict=True))


def require_stages(epochs: Sequence[int], fractions: Sequence[float]) -> None:
    """Checks what data and schedules are told of stages.

    Raises:
        UserError: they cannot be.
    """
    rising = all(one < other for one, other in pairwise([0.0, *fractions]))
    if not fractions or not rising or fractions[-1] != 1:
        raise UserError(f"fractions: {list(fractions)} must rise from above 0 to 1, such as [0.25, 0.5, 0.75, 1.0]")
    if len(epochs) != len(fractions) or min(epochs) < 1:
        raise UserError(f"epochs: give 1 or more for each of {len(fractions)} stages, not {list(epochs)}")


def stage_at(position: float, epochs: Sequence[int]) -> tuple[int, float]:
    """Which stage it is after so many epochs, and the share of it that is over. The last goes on.

    >>> stage_at(30.0, [25, 25, 50]), stage_at(100.0, [25, 25, 50])
    ((1, 0.2), (2, 1.0))
    """
    ends = list(accumulate(epochs))
    stage = min(sum(position >= end - 1e-6 for end in ends), len(ends) - 1)  # as rounding may have it
    return stage, min((position - ends[stage] + epochs[stage]) / epochs[stage], 1.0)


class Growing(Wrapped):
    """Images of a data set, of which training sees more from stage to stage.

    Args:
        data: images with one class each, or such a set that is damaged.
        epochs: of each stage; the recipe's epochs are their sum.
        fractions: of the images in each stage, rising to 1.
        smaller_batches: keep the noise of a step constant by smaller batches in early stages.
        growth_seed: decides which images come first.
    """

    def __init__(
        self,
        data: ImageData | Degraded,
        epochs: Sequence[int] = (25, 25, 25, 50),
        fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        smaller_batches: bool = False,
        growth_seed: int = 0,
    ) -> None:
        require_stages(epochs, fractions)
        super().__init__(data)
        self.epochs, self.fractions = list(epochs), list(fractions)
        self.smaller_batches, self.growth_seed = smaller_batches, growth_seed
        whole = data.damaged if isinstance(data, Degraded) else data
        self.stages = [self.part(whole, fraction) for fraction in fractions]
        self._told = -1

    def part(self, whole: ImageData, fraction: float) -> ImageData:
        """The same set with this share of each class, in the original order."""
        part, (source, positions) = copy.copy(whole), whole.training
        labels = source.labels[positions]
        sizes = torch.bincount(labels, minlength=len(self.classes))
        kept = rank_in_class(labels, self.growth_seed) < stage_counts(sizes, fraction)[labels]
        part.training = whole.training._replace(positions=positions[kept])
        part.batch_size = stage_batch(whole.batch_size, fraction) if self.smaller_batches else whole.batch_size
        return part

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        """Batches of the epoch's stage.

        Raises:
            UserError: the stages are over.
        """
        if epoch >= sum(self.epochs):
            raise UserError(f"epochs: the stages of data end after {sum(self.epochs)}; set the recipe's epochs to that")
        stage, _ = stage_at(epoch, self.epochs)
        part = self.stages[stage]
        part.seed, self.batch_size = self.seed, part.batch_size
        if stage != self._told:
            self._told = stage
            say(self.told(stage))
        return part.train(epoch, start)

    def told(self, stage: int) -> str:
        """What a person reads when a stage begins."""
        part, last = self.stages[stage], sum(self.epochs[: stage + 1])
        return (
            f"stage {stage + 1}/{len(self.stages)}, epochs {last - self.epochs[stage] + 1} to {last}:"
            f" {len(part.training.positions):,} images in batches of {part.batch_size};"
            f" all {sum(self.epochs)} epochs cost {full_epochs(self.epochs, self.fractions):g} of the full set"
        )


class ConstantNoise(Schedule):
    """The full rate, which falls by half a cosine to 0 in the last stage; for data with `smaller_batches`.

    >>> schedule = ConstantNoise(epochs=[1, 1, 2])
    >>> [round(schedule(progress), 3) for progress in (0.0, 0.3, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 1.0, 0.5, 0.0]

    Args:
        epochs: of each stage, as the data have them.
    """

    def __init__(self, epochs: Sequence[int] = (25, 25, 25, 50)) -> None:
        self.epochs = list(epochs)

    def __call__(self, progress: float) -> float:
        stage, done = stage_at(progress * sum(self.epochs), self.epochs)
        return Cosine()(done) if stage == len(self.epochs) - 1 else 1.0


class WarmRestarts(Schedule):
    """`sqrt(φ_s)` where a stage begins, and half a cosine down to a share of it; in the last stage to 0.

    >>> schedule = WarmRestarts(epochs=[1, 1], fractions=[0.25, 1.0])
    >>> [round(schedule(progress), 3) for progress in (0.0, 0.25, 0.4999, 0.5, 0.75, 1.0)]
    [0.5, 0.275, 0.05, 1.0, 0.5, 0.0]

    Args:
        epochs: of each stage, as the data have them.
        fractions: of the images in each stage, as the data have them.
        floor: the share that is left at the end of all stages but the last.
    """

    def __init__(
        self,
        epochs: Sequence[int] = (25, 25, 25, 50),
        fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        floor: float = 0.1,
    ) -> None:
        require_stages(epochs, fractions)
        self.epochs, self.fractions, self.floor = list(epochs), list(fractions), floor

    def __call__(self, progress: float) -> float:
        stage, done = stage_at(progress * sum(self.epochs), self.epochs)
        last = stage == len(self.epochs) - 1
        return math.sqrt(self.fractions[stage]) * Cosine(floor=0.0 if last else self.floor)(done)
