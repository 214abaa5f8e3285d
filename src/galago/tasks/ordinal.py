"""Classes that are grades: an answer two grades off is worse than one that is next to right.

Jacob Cohen, "Weighted Kappa: Nominal Scale Agreement with Provision for Scaled Disagreement or Partial Credit",
Psychological Bulletin 70(4), 1968; it is how gradings of diseases are compared, as in Xi Fang, Jiancheng Yang, Bingbing
Ni, "Stochastic Label Refinery", ICPR 2020 (`galago.regularize.label_refinery`).

A classifier over grades 0 … K-1 is trained as always; the answer is the expected grade, rounded, and agreement with the
labels is counted by how far off it is.

    grade = ⌊Σ_k k p_k + 1/2⌋
    κ = 1 - Σ w_ij O_ij / Σ w_ij E_ij,   w_ij = (i - j)² / (K - 1)²
    O the confusion matrix,  E the outer product of its marginals, scaled to the same sum

When: the order of classes means something. It costs nothing. κ is 1 for perfect answers and 0 for independent ones.
Recipe: none of its own; put it in the place of `galago.tasks.classify.Classify`.

Chosen here: where labels and answers all are one class, κ is 1 if they agree and 0 if not. `accuracy` is that of the
likeliest class, as in every classifier, κ and the decisions are those of the expected grade. Thresholds that are tuned
for κ on held-out answers are not offered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from galago.tasks.classify import Classify, TopAccuracy


def quadratic_weighted_kappa(confusion: Tensor) -> Tensor:
    """κ of a confusion matrix K×K (true grade, answer). A scalar, float64.

    >>> quadratic_weighted_kappa(torch.tensor([[5, 1, 0], [1, 3, 1], [0, 1, 4]]))
    tensor(0.8171, dtype=torch.float64)
    """
    observed = confusion.double()
    grade = torch.arange(len(observed), dtype=torch.float64, device=observed.device)
    weight = (grade[:, None] - grade).square()  # without the constant (K - 1)², which cancels
    expected = torch.outer(observed.sum(1), observed.sum(0)) / observed.sum().clamp_min(1)
    wrong, chance = (weight * observed).sum(), (weight * expected).sum()
    return torch.where(chance > 0, 1 - wrong / chance.where(chance > 0, 1.0), (wrong == 0).double())


def expected_grade(probabilities: Tensor) -> Tensor:
    """The expectation of N×K probabilities, rounded to a grade, halves up. N integers.

    >>> expected_grade(torch.tensor([[0.5, 0.0, 0.5], [0.9, 0.1, 0.0]]))
    tensor([1, 0])
    """
    grade = torch.arange(probabilities.shape[1], dtype=probabilities.dtype, device=probabilities.device)
    return ((probabilities * grade).sum(1) + 0.5).floor().long().clamp(0, probabilities.shape[1] - 1)


class Ordinal(Classify):
    """Classification into grades; a dict of outputs is judged by its entry `main`.

    Args:
        classes: how many grades, in their order.
    """

    def decisions(self, output: Any) -> Tensor:
        """The expected grade, rounded, N."""
        return expected_grade(self.decode(output))

    def metrics(self) -> MetricCollection:
        """`accuracy` in [0, 1] and `quadratic_weighted_kappa`, at most 1."""
        kappa = QuadraticWeightedKappa(self.classes)
        return MetricCollection({"accuracy": TopAccuracy(), "quadratic_weighted_kappa": kappa})


class QuadraticWeightedKappa(Metric):
    """κ of expected grades, from class probabilities and targets N×K.

    Args:
        classes: how many grades.
    """

    confusion: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Counts pairs of label and answer."""
        pairs = self.classes * target.argmax(1) + expected_grade(probabilities)
        self.confusion += torch.bincount(pairs, minlength=self.classes**2).view_as(self.confusion)

    def compute(self) -> Tensor:
        """κ of all that was counted."""
        return quadratic_weighted_kappa(self.confusion)
