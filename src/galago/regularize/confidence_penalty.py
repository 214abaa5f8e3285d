"""Confidence penalty: answers that leave nothing open cost a little more.

Gabriel Pereyra, George Tucker, Jan Chorowski, Łukasz Kaiser, Geoffrey Hinton, "Regularizing Neural Networks by
Penalizing Confident Output Distributions", ICLR 2017 workshop, arXiv:1701.06548 (recalled; one of the regularizers
compared in arXiv:2003.03879).

The entropy of what the network says is rewarded, so that it never becomes quite certain.

    L = CE(p, q) - β mean_b H(p_b),   H(p) = -Σ_k p_k ln p_k

When: as `galago.regularize.label_smoothing`, which pulls towards the uniform distribution from the other side and needs
no second loss; use one of them. It costs nothing.

Usual setting: β = 0.1. Recipe: recipes/regularize/confidence_penalty_resnet20_cifar10.yaml.

Chosen here: H is summed over classes, as the paper has it; some published code divides by their number besides.
"""

from __future__ import annotations

from torch import Tensor

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward, Method
from galago.task import scores_of


def mean_entropy(scores: Tensor) -> Tensor:
    """`mean_b H(p_b)` in nats, of scores N×K, a scalar.

    >>> import torch
    >>> round(mean_entropy(torch.tensor([[0.0, 0.0], [99.0, 0.0]])).item(), 4)
    0.3466
    """
    log = scores.log_softmax(1)
    return -(log.exp() * log).sum(1).mean()


class ConfidencePenalty(Method):
    """Rewards the entropy of the network's answers.

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
        if self.weight == 0:
            return step
        return step.add(confidence_penalty=-self.weight * mean_entropy(scores_of(step.output)))
