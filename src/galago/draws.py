"""Networks that draw noise when they predict: what several draws say together, and how far they disagree.

Class probabilities are averaged, never scores. For n draws of the scores z of one image,

    p̄ = (1/n) Σ_i softmax(z_i)        entropy  -Σ_k p̄_k ln p̄_k        variance  Σ_k (1/n) Σ_i (softmax(z_i)_k - p̄_k)²

The entropy is large where the network cannot decide, the variance where its answer hangs on the draw. The entropy H is
a sum of two: what every draw is unsure of, Ē = (1/n) Σ_i H(softmax(z_i)), aleatoric; and how far the draws differ,
I = H - Ē ≥ 0, epistemic, the mutual information of answer and draw.

Dropout that stays on when a network predicts (`dropping`) makes any network with dropout one that draws noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from galago.data import Loader
from galago.errors import UserError
from galago.layers import Wrapper
from galago.probe import Outputs, collect, device_of, evaluating
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


def aleatoric(scores: Tensor) -> Tensor:
    """Ē, in nats: N numbers of scores n×N×K.

    >>> aleatoric(torch.tensor([[[0.0, -999.0]], [[-999.0, 0.0]]]))
    tensor([0.])
    """
    found: Tensor = torch.special.entr(scores.softmax(2)).sum(2).mean(0)
    return found


def epistemic(scores: Tensor) -> Tensor:
    """I, in nats: N numbers of scores n×N×K; what rounding makes negative is 0.

    >>> epistemic(torch.tensor([[[0.0, -99.0]], [[-99.0, 0.0]]]))
    tensor([0.6931])
    """
    return (entropy(scores) - aleatoric(scores)).clamp_min(0)


def winner_variance(scores: Tensor) -> Tensor:
    """Of the probability of the class that wins in p̄, over the draws, divided by n: N numbers of scores n×N×K.

    >>> winner_variance(torch.tensor([[[0.0, -99.0]], [[-99.0, 0.0]]]))
    tensor([0.2500])
    """
    probabilities = scores.softmax(2)
    winner = probabilities.mean(0).argmax(1)
    return probabilities[:, torch.arange(len(winner)), winner].var(0, correction=0)


def dropouts(module: nn.Module) -> list[nn.Module]:
    """PyTorch's own dropout layers that leave something out."""
    return [part for part in module.modules() if isinstance(part, _DropoutNd) and part.p > 0]


@contextmanager
def dropping(module: nn.Module) -> Iterator[None]:
    """Evaluation mode but for dropout, which is on as long as the `with` lasts."""
    with evaluating(module):
        for part in dropouts(module):
            part.train()
        yield


class Dropping(Wrapper):
    """A network whose dropout is on whatever its mode.

    Args:
        layer: the network.
    """

    def forward(self, x: Tensor) -> Tensor:
        with dropping(self.layer):
            return scores_of(self.layer(x))


@contextmanager
def own_draws(module: nn.Module) -> Iterator[None]:
    """Random numbers from seed 0 as long as the `with` lasts; afterwards they go on as if nothing had been drawn."""
    device = device_of(module)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def asked(deployed: nn.Module, batches: Loader, draws: int) -> Outputs:
    """What a network says of some images in several passes, n×N×K in float64, and their targets N×K.

    Args:
        deployed: from raw images to class scores.
        batches: of images, the same in each pass.
        draws: n.
    """
    with own_draws(deployed):
        passes = [collect(deployed, batches) for _ in range(draws)]
    return Outputs(torch.stack([one.output for one in passes]).double(), passes[0].target)


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
