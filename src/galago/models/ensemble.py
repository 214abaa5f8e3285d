"""Ensemble: several networks for the same classes answer as one, by the mean of their probabilities.

Balaji Lakshminarayanan, Alexander Pritzel, Charles Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NIPS 2017, arXiv:1612.01474.

    p(x) = (1/M) Σ_m softmax(z_m(x))        the scores that are given: log p(x)

When: as a teacher better than any of its members, or where calibrated answers are worth M times the cost. Members that
differ in nothing but the seed of their training are enough.

    teacher:
      class_path: galago.models.ensemble.Ensemble
      init_args:
        members:
          - {class_path: galago.run.load, init_args: {run: runs/seed0}}
          - {class_path: galago.run.load, init_args: {run: runs/seed1}}

Recipe: recipes/distill/ensemble_resnet20_cifar10.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.errors import UserError


def mean_of_probabilities(scores: Sequence[Tensor]) -> Tensor:
    """`log (1/M) Σ softmax(z_m)`, N×K.

    >>> zero, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]])
    >>> mean_of_probabilities([zero, sure]).exp()
    tensor([[0.7500, 0.2500]])
    """
    log_probabilities = torch.stack([z.log_softmax(1) for z in scores])
    return log_probabilities.logsumexp(0) - math.log(len(scores))


class Ensemble(nn.Module):
    """Networks that answer together.

    Args:
        members: trained for the same classes and the same normalization.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise UserError("Ensemble: members is empty; name the networks that answer together")
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        """Normalized images to the logarithm of the mean probability, N×K."""
        scores = [member(image) for member in self.members]
        if len(sizes := {said.shape[1] for said in scores}) > 1:
            raise UserError(f"Ensemble: its members tell {sorted(sizes)} classes apart; they must know the same ones")
        return mean_of_probabilities(scores)
