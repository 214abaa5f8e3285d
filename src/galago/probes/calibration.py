"""Calibration: does a network that says 80 % turn out right in 80 % of the cases?

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599 (expected
calibration error); Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020, arXiv 2002.09437
(adaptive and class-wise forms); Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950.
Over- and underconfidence: Thulasidasan et al., "On Mixup Training: Improved Calibration and Predictive Uncertainty for
Deep Neural Networks", NeurIPS 2019, arXiv 1905.11001, and, for the second, the calibration literature after it. KS:
Gupta et al., "Calibration of Neural Networks using Splines", ICLR 2021, arXiv 2006.12800. (Both recalled.)

Images are sorted by confidence, the probability of the predicted class, into M bins of equal width; with n_m images,
mean confidence conf(m) and share of right answers acc(m) in bin m:

    ECE = Σ_m n_m/N · |acc(m) − conf(m)|        MCE = max_m |acc(m) − conf(m)|
    NLL = mean −log p(label)                    Brier = mean Σ_k (p_k − 1[k = label])²,  from 0 to 2

The adaptive form (AECE) cuts the sorted images into M bins of equal count; the class-wise form (CECE) applies the
formula to each class's probability on all images and averages over the classes. `CalibrationDetails` gives what else
papers report, by the formulas of `galago.reliability`: the average over bins, the root of the mean square (which
punishes few large gaps), over- and underconfidence (which way it errs, weighted by confidence), the Kolmogorov-Smirnov
error, which needs no bins, and the mean entropy of the class probabilities in nats.

When to use it: whenever a user acts on the probability. Low-bit networks and strongly distilled students often keep
their accuracy and lose this. All in float64; the binned errors are biased upward for few images (about √(M/N)), so
compare only on equally many.

Chosen where sources differ: bins are closed on the right, ((m−1)/M, m/M], with edges by division, so that 0.8 lies in
the bin it ends (torchmetrics closes them on the left: the same to 1e-5 unless many scores lie on edges); AECE uses
contiguous chunks of the stably sorted confidences (no image is lost); a probability of 0 falls into no bin of CECE; the
label of a soft target is its most likely class; probabilities below the smallest normal float64 count as that number,
so NLL stays finite. Scores that are not finite are refused.
"""

from __future__ import annotations

import torch

from galago.errors import UserError
from galago.probe import OutputProbe, Outputs
from galago.reliability import (
    Bins,
    answers,
    brier,
    class_wise_error,
    equal_counts,
    judged,
    kolmogorov_smirnov,
    negative_log_likelihood,
    reliability,
)
from galago.task import Task


class Calibration(OutputProbe):
    """Calibration errors and proper scores: `ece`, `mce`, `adaptive_ece`, `class_wise_ece`, `nll`, `brier`.

    Args:
        bins: of the reliability diagram.
    """

    def __init__(self, bins: int = 15) -> None:
        _require_bins(bins, "Calibration")
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


class CalibrationDetails(OutputProbe):
    """What else papers report: `average_ce`, `l2_ce`, `overconfidence`, `underconfidence`, `ks_error`, `entropy`.

    Args:
        bins: of the reliability diagram.
    """

    def __init__(self, bins: int = 15) -> None:
        _require_bins(bins, "CalibrationDetails")
        self.bins = bins

    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        probabilities, label = judged(outputs, task)
        confidence, correct = answers(probabilities, label)
        diagram = reliability(confidence, correct, self.bins)
        return {
            "average_ce": diagram.average_error(),
            "l2_ce": diagram.root_mean_square_error(),
            "overconfidence": diagram.overconfidence(),
            "underconfidence": diagram.underconfidence(),
            "ks_error": kolmogorov_smirnov(confidence, correct),
            "entropy": float(torch.special.entr(probabilities).sum(1).mean()),
        }


def _require_bins(bins: int, probe: str) -> None:
    if bins < 1:
        raise UserError(f"{probe}: bins is {bins}; 1 or more are needed (15 is customary)")
