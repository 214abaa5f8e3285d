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

import torch
from torch import Tensor

from galago.errors import UserError
from galago.probe import OutputProbe, Outputs
from galago.reliability import Bins, answers, equal_counts, judged, reliability
from galago.task import Task


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
        probabilities, label = judged(outputs, task)
        return reliability(*answers(probabilities, label), self.bins)

    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        probabilities, label = judged(outputs, task)
        confidence, correct = answers(probabilities, label)
        diagram = reliability(confidence, correct, self.bins)
        return {
            "ece": diagram.expected_error(),
            "mce": diagram.largest_error(),
            "adaptive_ece": equal_counts(confidence, correct, self.bins).expected_error(),
            "class_wise_ece": class_wise_error(probabilities, label, self.bins),
            "nll": negative_log_likelihood(probabilities, label),
            "brier": brier(probabilities, label),
        }
