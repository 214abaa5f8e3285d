"""Group heads: how often branches name the right group of classes, and what their word is worth.

Used for `galago.regularize.autogenous`, whose paper (Palacio et al., ICPR 2020, arXiv:2101.03057) reports the network
alone, trained with branches (TR), and the joint prediction (JP).

    accuracy_main       of the network alone
    accuracy_joint      of the joint prediction
    accuracy_groups_1   of the first branch, of its own groups; and so on

When to use it: to choose what ships, and whether a branch tells its groups apart at all. It passes the validation
images through all branches after each epoch; the numbers are in the run's log. A network without branches, such as the
one that ships alone, gives none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.probe import Probe, device_of, evaluating
from galago.regularize.auxiliary import auxiliary_in
from galago.task import Task


class GroupHeadAccuracy(Probe):
    """`accuracy_main`, `accuracy_joint` and `accuracy_groups_1`, … on validation."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        network = auxiliary_in(deployed)
        if network is None:
            return {}
        device, normalize = device_of(deployed), deployed.get_submodule("normalize")
        groups = [torch.tensor(one) for one in network.groups]
        right: dict[str, list[Tensor]] = {}
        with evaluating(deployed), torch.inference_mode():
            for batch in data.validation():
                label, heads = batch.target.argmax(1).cpu(), network.heads(normalize(batch.input.to(device)))
                said = {"main": (heads.main, label), "joint": (heads.joint, label)}
                for number, (branch, group) in enumerate(zip(heads.branches, groups, strict=True), 1):
                    said[f"groups_{number}"] = (branch, group[label])
                for name, (scores, wanted) in said.items():
                    right.setdefault(name, []).append(scores.argmax(1).cpu() == wanted)
        return {f"accuracy_{name}": float(torch.cat(one).double().mean()) for name, one in right.items()}
