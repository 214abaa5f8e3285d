"""Diversity: how far do the members of an ensemble differ, without which it is worth no more than one of them?

Balaji Lakshminarayanan, Alexander Pritzel, Charles Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NIPS 2017, arXiv:1612.01474; disagreement as in Stanislav Fort, Huiyi Hu, Balaji
Lakshminarayanan, "Deep Ensembles: A Loss Landscape Perspective", arXiv:1912.02757.

Of M members on the test images, with the formulas of `galago.draws`:

    members_accuracy_mean, members_accuracy_std    of single members
    members_disagreement                           share of images on which two members decide otherwise, over all pairs
    members_epistemic                              mean mutual information of answer and member, in nats

When to use it: beside the accuracy of a `galago.models.ensemble.Ensemble`. Members that never disagree answer together
what each answers alone, for M times the cost. It costs one pass through each member; a file gives no numbers.

Chosen here: the standard deviation divides by M. Disagreement is not divided by the error rate, as it sometimes is.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import nn

from galago.data import Data
from galago.draws import epistemic
from galago.models.ensemble import Ensemble
from galago.probe import Probe, collect
from galago.reliability import require_finite
from galago.task import Task


class Diversity(Probe):
    """How well the members of an ensemble decide alone, and how often two of them decide otherwise."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        ensemble = next((part for part in deployed.modules() if isinstance(part, Ensemble)), None)
        if ensemble is None:
            return {}
        normalize = deployed.get_submodule("normalize")
        seen = [collect(nn.Sequential(normalize, member), data.test()) for member in ensemble.members]
        scores, label = torch.stack([one.output for one in seen]).double(), seen[0].target.argmax(1)
        require_finite(scores.flatten(0, 1))
        decided = scores.argmax(2)
        accuracy = (decided == label).double().mean(1)
        apart = [float((one != other).double().mean()) for one, other in combinations(decided, 2)]
        return {
            "members_accuracy_mean": float(accuracy.mean()),
            "members_accuracy_std": float(accuracy.std(correction=0)),
            "members_disagreement": sum(apart) / max(len(apart), 1),
            "members_epistemic": float(epistemic(scores).mean()),
        }
