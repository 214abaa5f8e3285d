"""Brier score as a loss: squared distance between stated probabilities and the truth.

Glenn Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review, 1950; a baseline
among losses for calibration (Mukhoti et al., NeurIPS 2020).

Like the cross-entropy it is smallest, in expectation, for the true probabilities, but a single wrong answer costs at
most 2. The network gains little from being still surer, and outliers do not drive it.

    L = mean Σ_k (softmax(z)_k - q_k)²

When: wrong labels, or probabilities that have to be right without a correction afterwards. It costs nothing. Its
gradient fades where a network is surely wrong, so that training starts slower than with cross-entropy, most with many
classes.

Usual setting: nothing to choose but the learning rate. No recipe: change the task of any classifier's recipe.

Chosen here: summed over classes, as `galago.probes.calibration` reports it (0 to 2). Mixed and soft targets need
nothing special.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from galago.batch import Batch
from galago.task import scores_of
from galago.tasks.classify import Classify


def brier_loss(scores: Tensor, target: Tensor) -> Tensor:
    """`Σ_k (p_k - q_k)²`, averaged over the batch. A scalar.

    Args:
        scores: z, N×K.
        target: q, class probabilities N×K.

    >>> import torch
    >>> brier_loss(torch.tensor([[2.0, 1, 0], [0, 1, 3]]), torch.eye(3)[[0, 1]])
    tensor(0.8392)
    """
    return (scores.softmax(1) - target).square().sum(1).mean()


class Brier(Classify):
    """Classification by the Brier score.

    Args:
        classes: how many.
    """

    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """`brier`, averaged over the batch; targets are probabilities N×K."""
        return {"brier": brier_loss(scores_of(output).float(), batch.target)}
