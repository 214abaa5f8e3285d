"""Reliability: how far stated probabilities are from what comes true. Pure functions; nothing here knows a network.

Sources and choices are those of `galago.probes.calibration`, which measures by these. Everything is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from galago.probe import Outputs
from galago.task import Task


class Bins(NamedTuple):
    """A reliability diagram: one entry a bin, float64. Empty bins have 0 images and zeros."""

    confidence: Tensor  # mean confidence in the bin
    accuracy: Tensor  # share of right answers in the bin
    images: Tensor  # how many

    def gaps(self) -> Tensor:
        """|accuracy − confidence| of each bin; 0 where it is empty."""
        return (self.accuracy - self.confidence).abs()

    def expected_error(self) -> float:
        """The gaps, averaged over images."""
        return float((self.images * self.gaps()).sum() / self.images.sum().clamp_min(1))

    def largest_error(self) -> float:
        """The largest gap of any bin."""
        return float(self.gaps().max())


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> Bins:
    """The reliability diagram with bins of equal width, closed on the right; a confidence of 0 is in the first.

    Args:
        confidence: N, in [0, 1].
        correct: N, 1 where the answer was right.
        bins: how many.

    >>> diagram = reliability(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([1, 0, 0]), bins=2)
    >>> round(diagram.expected_error(), 6), round(diagram.largest_error(), 6)
    (0.366667, 0.4)
    """
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    return _means(confidence.double(), correct.double(), torch.bucketize(confidence.double(), edges), bins)


def equal_counts(confidence: Tensor, correct: Tensor, bins: int = 15) -> Bins:
    """The reliability diagram with bins of equal count (the first N mod M hold one image more).

    Args:
        confidence: N, in [0, 1].
        correct: N, 1 where the answer was right.
        bins: how many.
    """
    order = confidence.double().argsort(stable=True)
    sizes = torch.tensor([len(chunk) for chunk in torch.tensor_split(order, bins)])
    where = torch.repeat_interleave(torch.arange(bins), sizes)
    return _means(confidence.double()[order], correct.double()[order], where, bins)


def judged(outputs: Outputs, task: Task) -> tuple[Tensor, Tensor]:
    """Probabilities in float64 and labels."""
    probabilities: Tensor = task.decode(outputs.output.double())
    return probabilities, outputs.target.argmax(1)


def answers(probabilities: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of the predicted class (the lowest index on ties) and whether it was right."""
    confidence, predicted = probabilities.max(1)
    return confidence, predicted == label


def _means(confidence: Tensor, correct: Tensor, where: Tensor, bins: int) -> Bins:
    count = torch.bincount(where, minlength=bins).double()
    means = [torch.bincount(where, values, bins) / count.clamp_min(1) for values in (confidence, correct)]
    return Bins(means[0], means[1], count)
