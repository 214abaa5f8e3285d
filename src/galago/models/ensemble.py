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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.draws import log_mean_probability
from galago.errors import UserError


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
        return log_mean_probability(torch.stack(scores))
