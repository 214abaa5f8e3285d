"""Reliability: how far stated probabilities are from what comes true. Pure functions; nothing here knows a network.

Of N images, conf_i is the largest class probability and corr_i whether that class was right. Images lie in M bins by
confidence; with n_m images, mean confidence conf(m) and share of right answers acc(m) in bin m, and d(m) = acc(m) -
conf(m):

    expected error     Σ_m n_m/N |d(m)|          largest           max_m |d(m)|
    root mean square   sqrt(Σ_m n_m/N d(m)²)     average           mean of |d(m)| over the bins that hold an image
    overconfidence     Σ_m n_m/N conf(m) relu(-d(m))
    underconfidence    Σ_m n_m/N conf(m) relu(d(m))
    without bins (KS)  max_j |(1/N) Σ_{i ≤ j} (corr_i - conf_i)|, with the images in order of confidence

Sources and choices are those of `galago.probes.calibration`, which measures by these. Everything is float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from galago.errors import UserError
from galago.probe import Outputs
from galago.task import Task


class Bins(NamedTuple):
    """A reliability diagram: one entry a bin, float64. Empty bins have 0 images and zeros."""

    confidence: Tensor  # mean confidence in the bin
    accuracy: Tensor  # share of right answers in the bin
    images: Tensor  # how many

    def gaps(self) -> Tensor:
        """|accuracy - confidence| of each bin; 0 where it is empty."""
        return (self.accuracy - self.confidence).abs()

    def expected_error(self) -> float:
        """The gaps, averaged over images."""
        return self._over_images(self.gaps())

    def largest_error(self) -> float:
        """The largest gap of any bin."""
        return float(self.gaps().max())

    def average_error(self) -> float:
        """The gaps, averaged over the bins that hold an image."""
        return float(self.gaps().sum() / (self.images > 0).sum().clamp_min(1))

    def root_mean_square_error(self) -> float:
        """The root of the squared gaps' average over images; large gaps count more."""
        return math.sqrt(self._over_images(self.gaps().square()))

    def overconfidence(self) -> float:
        """By how much confidence is too high, weighted by the confidence itself: the errors that cost most."""
        return self._over_images(self.confidence * (self.confidence - self.accuracy).relu())

    def underconfidence(self) -> float:
        """By how much confidence is too low, weighted by the confidence itself."""
        return self._over_images(self.confidence * (self.accuracy - self.confidence).relu())

    def _over_images(self, values: Tensor) -> float:
        return float((self.images * values).sum() / self.images.sum().clamp_min(1))


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


def kolmogorov_smirnov(confidence: Tensor, correct: Tensor) -> float:
    """The largest gap between how many answers are right and how many are stated to be, up to any confidence.

    Equal confidences keep the order of the images.

    Args:
        confidence: N, in [0, 1].
        correct: N, 1 where the answer was right.

    >>> round(kolmogorov_smirnov(torch.tensor([0.9, 0.6]), torch.tensor([0, 1])), 6)
    0.25
    """
    order = confidence.double().argsort(stable=True)
    return float((correct.double() - confidence.double())[order].cumsum(0).abs().max() / len(order))


def negative_log_likelihood(probabilities: Tensor, label: Tensor) -> float:
    """Mean -log of the label's probability, in nats. `probabilities` N×K, `label` N."""
    chosen = probabilities.double().gather(1, label[:, None])
    return float(-chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean())


def brier(probabilities: Tensor, label: Tensor) -> float:
    """Mean squared distance from the truth, summed over classes: 0 to 2. `probabilities` N×K, `label` N."""
    truth = torch.nn.functional.one_hot(label, probabilities.shape[1])
    return float((probabilities.double() - truth).square().sum(1).mean())


def answers(probabilities: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of the predicted class (the lowest index on ties) and whether it was right. N each."""
    confidence, predicted = probabilities.max(1)
    return confidence, predicted == label


def judged(outputs: Outputs, task: Task) -> tuple[Tensor, Tensor]:
    """What a user sees of stored outputs: class probabilities N×K in float64; and labels, N.

    Raises:
        UserError: there are no images, or some output is not a number.
    """
    require_finite(outputs.output)
    probabilities: Tensor = task.decode(outputs.output.double())
    return probabilities, outputs.target.argmax(1)


def require_finite(output: Tensor) -> None:
    """Checks that there are scores and that all are numbers. N×K.

    Raises:
        UserError: otherwise.
    """
    if not len(output):
        raise UserError("there are no images to measure calibration on; give the data set some")
    broken = ~output.isfinite().all(1)
    if broken.any():
        raise UserError(
            f"the network's scores are not finite for {int(broken.sum())} of {len(output)} images, so its calibration"
            " cannot be measured; training has diverged (try a smaller learning rate) or the file computes wrongly"
        )


def _means(confidence: Tensor, correct: Tensor, where: Tensor, bins: int) -> Bins:
    count = torch.bincount(where, minlength=bins).double()
    means = [torch.bincount(where, values, bins) / count.clamp_min(1) for values in (confidence, correct)]
    return Bins(means[0], means[1], count)
