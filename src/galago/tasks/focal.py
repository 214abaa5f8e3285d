"""Focal loss: images that a network is already sure of count less.

Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He, Piotr Dollár, "Focal Loss for Dense Object Detection", ICCV 2017,
arXiv:1708.02002; for calibration Jishnu Mukhoti, Viveka Kulharia, Amartya Sanyal, Stuart Golodetz, Philip Torr, Puneet
Dokania, "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020, arXiv:2002.09437.

The cross-entropy of each image is multiplied by a power of what is missing to certainty, so that training stops pushing
answers that are right. The sample-dependent form (FLSD-53) takes a larger power where the network is far off.

    p = softmax(z)        L = - mean Σ_k q_k (1 - p_k)^γ log p_k            for a label y: -(1 - p_y)^γ log p_y
    FLSD-53               γ = 5 where p_k < 0.2, otherwise 3; constant for the gradient

When: a classifier trained for long, whose probabilities are to be used. It costs nothing. Large γ makes networks
under-confident; temperature scaling mends both. Another loss than cross-entropy has other best learning rates.

Usual setting: γ = 3, or FLSD-53; 350 epochs on CIFAR-10, SGD at 0.1, a tenth from epochs 150 and 250 on, batch 128,
decay 5e-4 (recalled). Read elsewhere for ResNet-50 on CIFAR-10, in percent: ECE 1.48 (γ = 3) and 1.55 (FLSD-53)
instead of 4.35. Recipe: recipes/regularize/focal_resnet20_cifar10.yaml.

Chosen here: mixed and soft targets weigh the losses of the classes, each with its own p_k and γ, as the cross-entropy
does; at γ = 0 it is the cross-entropy. Probabilities are the softmax as ever, without a correction for γ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galago.batch import Batch
from galago.errors import UserError
from galago.task import scores_of
from galago.tasks.classify import Classify


def focal_loss(scores: Tensor, target: Tensor, gamma: float | Tensor) -> Tensor:
    """`-Σ_k q_k (1 - p_k)^γ log p_k`, averaged over the batch. A scalar.

    Args:
        scores: z, N×K.
        target: q, class probabilities N×K.
        gamma: γ, one number or N×K, constant.

    >>> focal_loss(torch.tensor([[2.0, 1, 0], [0, 1, 3]]), torch.eye(3)[[0, 1]], 3.0)
    tensor(0.7617)
    """
    log_p = scores.log_softmax(1)
    missing = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)  # a power below 1 has no gradient at 0
    return -(target * missing**gamma * log_p).sum(1).mean()


def powers(scores: Tensor, unsure: float, otherwise: float, threshold: float) -> Tensor:
    """γ of each class's own probability, N×K: `unsure` below the threshold.

    >>> powers(torch.tensor([[2.0, 0.0]]), 5.0, 3.0, 0.2)
    tensor([[3., 5.]])
    """
    p = scores.detach().softmax(1)
    return torch.where(p < threshold, unsure, otherwise)


class Focal(Classify):
    """Classification by focal loss.

    Args:
        classes: how many.
        gamma: γ; 0 is the cross-entropy.
    """

    def __init__(self, classes: int, gamma: float = 3.0) -> None:
        super().__init__(classes)
        if gamma < 0:
            raise UserError(f"Focal: gamma is {gamma:g}; give 0 or more, usually 3")
        self.gamma = gamma

    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """`focal`, averaged over the batch; targets are probabilities N×K."""
        return {"focal": focal_loss(scores_of(output).float(), batch.target, self.gamma)}


class SampleDependentFocal(Classify):
    """Classification by focal loss with a larger power where the network is far off (FLSD-53).

    Args:
        classes: how many.
        unsure: γ below the threshold.
        gamma: γ from there on.
        threshold: for the probability that the network gives a class.
    """

    def __init__(self, classes: int, unsure: float = 5.0, gamma: float = 3.0, threshold: float = 0.2) -> None:
        super().__init__(classes)
        if min(unsure, gamma) < 0 or not 0 <= threshold <= 1:
            raise UserError(
                f"SampleDependentFocal: unsure is {unsure:g}, gamma {gamma:g}, threshold {threshold:g}; give two"
                " powers, 0 or more, and a probability"
            )
        self.unsure, self.gamma, self.threshold = unsure, gamma, threshold

    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """`focal`, averaged over the batch; targets are probabilities N×K."""
        scores = scores_of(output).float()
        gamma = powers(scores, self.unsure, self.gamma, self.threshold)
        return {"focal": focal_loss(scores, batch.target, gamma)}
