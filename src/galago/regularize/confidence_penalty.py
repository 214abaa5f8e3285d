"""Confidence penalty: a network is paid for the entropy of what it says.

Gabriel Pereyra, George Tucker, Jan Chorowski, Łukasz Kaiser, Geoffrey Hinton, "Regularizing Neural Networks by
Penalizing Confident Output Distributions", 2017, arXiv:1701.06548.

The more evenly an answer is spread over the classes, the less it costs. Like label smoothing it keeps the scores
finite, but it does not say where the rest of the probability should go.

    L = L_task - β mean_b H(p_b),   H(p) = - Σ_k p_k log p_k,   p = softmax(z)

When: a network that is over-confident and may lose a little certainty everywhere; it costs nothing. It does not know
whether an answer is right, and makes an under-confident network worse. Compare with a plain network after temperature
scaling (`galago.probes.temperature`).

Usual setting: β = 0.1 (the paper tried 0.1 to 8 by task). The released code of RankMixup (ICCV 2023), which compares
with this at β = 0.1, averages over classes, too: that is β / K here, 0.01 for ten classes. Recipe:
recipes/regularize/confidence_penalty_resnet20_cifar10.yaml.

Chosen here: the paper's convention only, the entropy in nats. Its loss is logged as it is added, at most 0. Targets do
not enter, so that mixed and soft ones need nothing special.
"""

from __future__ import annotations

from torch import Tensor

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward, Method
from galago.task import scores_of


def mean_entropy(scores: Tensor) -> Tensor:
    """Of the class probabilities of each image, in nats, averaged. A scalar.

    Args:
        scores: z, N×K.

    >>> import torch
    >>> mean_entropy(torch.zeros(3, 2))  # ln 2
    tensor(0.6931)
    """
    log_p = scores.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


class ConfidencePenalty(Method):
    """Subtracts the mean entropy of the class probabilities from the loss.

    Args:
        weight: β.
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        if weight < 0:
            raise UserError(f"ConfidencePenalty: weight is {weight:g}; give 0 or more, usually 0.1")
        self.weight = weight

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        return step.add(confidence_penalty=-self.weight * mean_entropy(scores_of(step.output).float()))
