"""Networks that draw noise when they predict: what several draws say together, and how far they disagree.

Class probabilities are averaged, never scores. For n draws of the scores z of one image,

    p̄ = (1/n) Σ_i softmax(z_i)        entropy  -Σ_k p̄_k ln p̄_k        variance  Σ_k (1/n) Σ_i (softmax(z_i)_k - p̄_k)²

The entropy is large where the network cannot decide, the variance where its answer hangs on the draw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from galago.errors import UserError
from galago.layers import Wrapper
from galago.task import scores_of


def log_mean_probability(scores: Tensor) -> Tensor:
    """`ln p̄`, N×K, of scores n×N×K.

    >>> log_mean_probability(torch.tensor([[[9.0, 9.0]], [[0.0, 0.0]]])).exp()
    tensor([[0.5000, 0.5000]])
    """
    return scores.log_softmax(2).logsumexp(0) - math.log(len(scores))


def entropy(scores: Tensor) -> Tensor:
    """Of the averaged probabilities, in nats: N numbers of scores n×N×K."""
    log_mean = log_mean_probability(scores)
    return -(log_mean.exp() * log_mean).sum(1)


def variance(scores: Tensor) -> Tensor:
    """Of the probabilities over the draws, summed over the classes: N numbers of scores n×N×K.

    >>> variance(torch.tensor([[[0.0, -99.0]], [[-99.0, 0.0]]]))
    tensor([0.5000])
    """
    return scores.softmax(2).var(0, correction=0).sum(1)


class MeanOfDraws(Wrapper):
    """A network that draws noise for each image anew, asked several times; its scores are those of the mean answer.

    All draws go through the network as one batch.

    Args:
        layer: the network.
        draws: how often it is asked.
    """

    def __init__(self, layer: torch.nn.Module, draws: int) -> None:
        super().__init__(layer)
        if draws < 1:
            raise UserError(f"MeanOfDraws: draws is {draws}; give 1 or more")
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        many = x.unsqueeze(0).expand(self.draws, *x.shape).flatten(0, 1)
        scores = scores_of(self.layer(many))
        return log_mean_probability(scores.view(self.draws, -1, scores.shape[1]))
