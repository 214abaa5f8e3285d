"""Calibration: does a network that says 80 % turn out right in 80 % of the cases?

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599 (expected
calibration error); Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020, arXiv 2002.09437
(adaptive and class-wise forms); Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950.

Images are sorted by confidence, the probability of the predicted class, into M bins of equal width; with n_m images,
mean confidence conf(m) and share of right answers acc(m) in bin m:

    ECE = Σ_m n_m/N · |acc(m) − conf(m)|        MCE = max_m |acc(m) − conf(m)|
    NLL = mean −log p(label)                    Brier = mean Σ_k (p_k − 1[k = label])²,  from 0 to 2

The adaptive form (AECE) cuts the sorted images into M bins of equal count; the class-wise form (CECE) applies the
formula to each class's probability on all images and averages over the classes.

When to use it: whenever a user acts on the probability. Low-bit networks and strongly distilled students often keep
their accuracy and lose this. All in float64; the binned errors are biased upward for few images (about √(M/N)), so
compare only on equally many.

Chosen where sources differ: bins are closed on the right, ((m−1)/M, m/M], with edges by division, so that 0.8 lies in
the bin it ends; AECE uses contiguous chunks of the stably sorted confidences (no image is lost); a probability of 0
falls into no bin of CECE; the label of a soft target is its most likely class; probabilities below the smallest normal
float64 count as that number, so NLL stays finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from galago.errors import UserError
from galago.probe import OutputProbe, Outputs
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


def class_wise_error(probabilities: Tensor, label: Tensor, bins: int = 15) -> float:
    """Expected calibration error of each class's own probability, averaged over the classes.

    Args:
        probabilities: N×K.
        label: N, integers.
        bins: how many.
    """
    errors = []
    for k in range(probabilities.shape[1]):
        counted = probabilities[:, k] > 0
        diagram = reliability(probabilities[counted, k], label[counted] == k, bins)
        errors.append(diagram.expected_error() * float(counted.double().mean()))
    return sum(errors) / len(errors)


def negative_log_likelihood(probabilities: Tensor, label: Tensor) -> float:
    """Mean −log of the label's probability, in nats. `probabilities` N×K, `label` N."""
    chosen = probabilities.double().gather(1, label[:, None])
    return float(-chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean())


def brier(probabilities: Tensor, label: Tensor) -> float:
    """Mean squared distance from the truth, summed over classes: 0 to 2. `probabilities` N×K, `label` N."""
    truth = torch.nn.functional.one_hot(label, probabilities.shape[1])
    return float((probabilities.double() - truth).square().sum(1).mean())


def _means(confidence: Tensor, correct: Tensor, where: Tensor, bins: int) -> Bins:
    count = torch.bincount(where, minlength=bins).double()
    means = [torch.bincount(where, values, bins) / count.clamp_min(1) for values in (confidence, correct)]
    return Bins(means[0], means[1], count)


class Calibration(OutputProbe):
    """Calibration errors and proper scores: `ece`, `mce`, `adaptive_ece`, `class_wise_ece`, `nll`, `brier`.

    Args:
        bins: of the reliability diagram.
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise UserError(f"Calibration: bins is {bins}; 1 or more are needed (15 is customary)")
        self.bins = bins

    def diagram(self, outputs: Outputs, task: Task) -> Bins:
        """Confidence, accuracy and count of each bin, for a plot."""
        probabilities, label = _judged(outputs, task)
        return reliability(*_answers(probabilities, label), self.bins)

    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        probabilities, label = _judged(outputs, task)
        confidence, correct = _answers(probabilities, label)
        diagram = reliability(confidence, correct, self.bins)
        return {
            "ece": diagram.expected_error(),
            "mce": diagram.largest_error(),
            "adaptive_ece": equal_counts(confidence, correct, self.bins).expected_error(),
            "class_wise_ece": class_wise_error(probabilities, label, self.bins),
            "nll": negative_log_likelihood(probabilities, label),
            "brier": brier(probabilities, label),
        }


def _judged(outputs: Outputs, task: Task) -> tuple[Tensor, Tensor]:
    """Probabilities in float64 and labels."""
    probabilities: Tensor = task.decode(outputs.output.double())
    return probabilities, outputs.target.argmax(1)


def _answers(probabilities: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of the predicted class (the lowest index on ties) and whether it was right."""
    confidence, predicted = probabilities.max(1)
    return confidence, predicted == label
