"""Heads: what every branch of a network in training would score alone, and all of them together.

Used for methods that train several classifiers at once: `galago.distill.feature_fusion`, whose paper (Kim et al., ICPR
2020, arXiv:1904.09058) reports each network, their ensemble and the fused classifier; `galago.distill.native_ensemble`.

When to use it: to see whether branches help each other, and whether shipping all of them would be worth their cost. It
passes the validation images through all branches after each epoch; the numbers are in the run's log. A network that
has but one head, such as the one that ships, gives none.

Chosen here: the ensemble is the mean of the branches' scores. `disagreement` is the share of images on which not all
branches decide for the same class: at 0 they are copies of one another, and teach each other nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.distill.ensemble import Ensemble, ensemble_in
from galago.probe import Probe, device_of, evaluating
from galago.task import Task


class HeadAccuracy(Probe):
    """`accuracy_branch_1`, …, `accuracy_ensemble`, that of the joint answer, and `disagreement`, on validation."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        ensemble = ensemble_in(deployed)
        if ensemble is None:
            return {}
        with evaluating(deployed), torch.inference_mode():
            batches = list(decided(deployed, ensemble, task, data))
        decisions = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
        target = decisions.pop("target")
        branches = torch.stack([decision for name, decision in decisions.items() if name.startswith("branch_")])
        found = {f"accuracy_{name}": share(decision == target) for name, decision in decisions.items()}
        return found | {"disagreement": share((branches != branches[0]).any(0))}


def decided(deployed: nn.Module, ensemble: Ensemble, task: Task, data: Data) -> Iterator[dict[str, Tensor]]:
    """Every head's decisions, batch by batch, with the target's."""
    device, normalize = device_of(deployed), deployed.get_submodule("normalize")
    for batch in data.validation():
        heads = ensemble.heads(normalize(batch.input.to(device)))
        named = {f"branch_{number}": one for number, one in enumerate(heads.branches, 1)}
        named |= {"ensemble": torch.stack(heads.branches).mean(0), ensemble.joint.title: heads.joint}
        yield {name: task.decisions(one).cpu() for name, one in named.items()} | {"target": batch.target.argmax(1)}


def share(right: Tensor) -> float:
    """The share of a boolean tensor that is true."""
    return float(right.double().mean())
