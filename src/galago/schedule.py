"""Schedules: pure functions of progress, from 0 at the first step to 1 at the last, giving a factor on a rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Schedule(ABC):
    """A factor on the learning rate (or on a loss weight) for every moment of training."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """The factor at `progress` in [0, 1]."""


class Constant(Schedule):
    """The same rate throughout."""

    def __call__(self, progress: float) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from 1 down to `floor`, after a linear warm-up.

    >>> schedule = Cosine(warmup=0.1)
    >>> [round(schedule(progress), 3) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Args:
        warmup: share of the training during which the rate rises linearly from 0.
        floor: the factor at the end.
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the training, in [0, 1); got {warmup}")
        self.warmup, self.floor = warmup, floor

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class LinearDecay(Schedule):
    """From 1 to 0 in a straight line.

    >>> [LinearDecay()(progress) for progress in (0.0, 0.25, 1.0)]
    [1.0, 0.75, 0.0]
    """

    def __call__(self, progress: float) -> float:
        return 1.0 - progress


class RampUp(Schedule):
    """`exp(-5 (1 - progress / until)²)` up to `until`, then 1: nearly nothing for a good while, then all.

    It is the ramp of S. Laine and T. Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017,
    arXiv:1610.02242, for losses that compare networks which know nothing yet.

    >>> [round(RampUp(until=0.5)(progress), 4) for progress in (0.0, 0.25, 0.5, 1.0)]
    [0.0067, 0.2865, 1.0, 1.0]

    Args:
        until: share of the training after which the factor is 1; 0 is 1 throughout.
    """

    def __init__(self, until: float = 80 / 300) -> None:
        if not 0 <= until <= 1:
            raise ValueError(f"until is a share of the training, in [0, 1]; got {until}")
        self.until = until

    def __call__(self, progress: float) -> float:
        return math.exp(-5 * (1 - progress / self.until) ** 2) if progress < self.until else 1.0


class Steps(Schedule):
    """Multiplied by `factor` at each milestone, after a linear warm-up.

    >>> schedule = Steps(milestones=[0.5, 0.75])
    >>> [round(schedule(progress), 3) for progress in (0.0, 0.5, 0.9)]
    [1.0, 0.1, 0.01]

    Args:
        milestones: shares of the training, rising.
        factor: what the rate is multiplied by at each.
        warmup: share of the training during which the rate rises linearly from 0.
    """

    def __init__(self, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1, warmup: float = 0.0) -> None:
        if list(milestones) != sorted(milestones) or not all(0 < milestone < 1 for milestone in milestones):
            raise ValueError(f"milestones are rising shares of the training, in (0, 1); got {list(milestones)}")
        self.milestones, self.factor, self.warmup = list(milestones), factor, warmup

    def __call__(self, progress: float) -> float:
        rise = progress / self.warmup if progress < self.warmup else 1.0
        return float(rise * self.factor ** sum(progress >= milestone for milestone in self.milestones))


class Restarts(Schedule):
    """A schedule that runs once over the first epochs and then over every few that follow.

    >>> schedule = Restarts(Cosine(), epochs=8, first=4, every=2)
    >>> [round(schedule(epoch / 8), 3) for epoch in (0, 2, 4, 5, 6, 7)]
    [1.0, 0.5, 1.0, 0.5, 1.0, 0.5]

    Args:
        schedule: what runs each time.
        epochs: of the whole training.
        first: epochs of the first run; 0 for none.
        every: epochs of each further run.
    """

    def __init__(self, schedule: Schedule, epochs: int, first: int, every: int) -> None:
        if epochs < 1 or first < 0 or every < 1:
            raise ValueError(f"epochs and every are 1 or more and first is not negative; got {epochs, every, first}")
        self.schedule, self.epochs, self.first, self.every = schedule, epochs, first, every

    def __call__(self, progress: float) -> float:
        done = progress * self.epochs + 1e-6  # what is a whole number may be a hair less after a division
        share = done / self.first if done < self.first else (done - self.first) % self.every / self.every
        return self.schedule(min(share, 1.0))
