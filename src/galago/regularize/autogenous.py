"""SSAL: branches learn groups of classes that the network itself confuses, and have a say in its prediction.

Sebastian Palacio, Philipp Engler, Jörn Hees, Andreas Dengel, "Contextual Classification Using Self-Supervised Auxiliary
Models for Deep Neural Networks", ICPR 2020, arXiv:2101.03057.

Classes that a trained network confuses are gathered in groups. A second training gives the network small branches at
several depths, each of which tells such groups apart; all are trained at once. What ships is the network alone, which
has learned better features (TR), or the product of everyone's probabilities (JP).

    M = confusions of a trained network on held-out images, without the diagonal
    D = max(M) - M for groups of similar classes, or M to split them up;  D ← (D + Dᵀ) / 2
    grouping: seeds far apart, then class by class into the nearest group that is not full (1.1 K / G classes)
    L = CE(z, y) + Σ_i w_i CE(a_i, g_i(y))
    P(c) ∝ softmax(z)_c Π_i softmax(a_i)_{g_i(c)}^e                        the joint prediction

When: classes fall into families and a first training has been done anyway. Training costs the branches; TR costs
nothing afterwards, JP the branches in the file (in float) and in every answer. List it behind `Quantize` and behind
methods that branch the network as a whole.

Usual setting: for 100 classes 20, 33 and 50 groups after stages 1, 2 and 3, w = 0.42, 0.59, 0.76, e = 0.3 (ResNet-50;
0.4 and 0.5 for wider networks); w = 1 on ImageNet. Recipe: recipes/regularize/ssal_resnet20_cifar10.yaml.

Chosen here: a branch is two depthwise-separable convolutions and a linear layer, where the papers' own are parts of
Inception. Ties go to the lowest class. Targets may be mixed or smoothed: a group's probability is the sum of its
classes'. Confusions are counted on the data's validation images: set `hold_out` in both runs, or classes are grouped by
the test set. A file of predictions, `predictions/model.npz` of a run, holds answers to its test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.layers import swap
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized, shared
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.regularize.auxiliary import Auxiliary, Branch, auxiliary_in, channels_at
from galago.regularize.grouping import group_targets, grouping, members
from galago.task import scores_of


class Autogenous(Method):
    """Trains branches of the model that tell apart groups of classes which another network confuses.

    Args:
        base: the trained network whose confusions are counted on the validation images (`galago.run.load`), or a file
            of a run's predictions.
        layers: paths of the layers that branches read, from the first on.
        groups: G, how many groups each branch tells apart, mostly rising.
        branch_weights: w, of each branch's cross-entropy; 1 each by default.
        similar: gather classes that are confused; else keep them apart.
        exponent: e, how much the branches' word counts in the joint prediction.
        ship_joint: ship the joint prediction with all branches; else the network alone.
    """

    def __init__(
        self,
        base: nn.Module | Path,
        layers: Sequence[str],
        groups: Sequence[int],
        branch_weights: Sequence[float] | None = None,
        similar: bool = True,
        exponent: float = 0.3,
        ship_joint: bool = False,
    ) -> None:
        super().__init__()
        if not len(layers) == len(groups) == len(groups if branch_weights is None else branch_weights) > 0:
            raise UserError("Autogenous: give as many groups, and as many weights, as layers; at least one of each")
        if exponent < 0:
            raise UserError(f"Autogenous: exponent is {exponent:g}; give 0 or more, usually 0.3")
        self.base: nn.Module | Path
        self.__dict__.update(base=base)  # no part of this training
        self.layers, self.groups, self.branch_weights = list(layers), list(groups), branch_weights
        self.similar, self.exponent, self.ship_joint = similar, exponent, ship_joint
        self.maps: list[list[int]] = []
        self._names: tuple[str, ...] = ()  # of the classes

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Puts a network with branches in the model's place.

        Raises:
            UserError: there are not so many classes, the base network confuses none, or a layer gives no map.
        """
        classes, device = len(data.classes), device_of(model)
        for count in self.groups:
            if not 2 <= count <= classes:
                raise UserError(f"Autogenous: {count} groups of {classes} classes; give 2 to {classes}")
        if not self.maps:
            confusion = shared(self.confusion(data, device))
            self.maps = [grouping(confusion, count, self.similar) for count in self.groups]
        self._names = data.classes
        image = normalized(data, data.example(), device)
        if self.ship_joint:
            require_scores(model, image, classes)
        channels = [channels_at(model, path, image, "Autogenous") for path in self.layers]
        branches = [Branch(*sizes).to(device) for sizes in zip(channels, self.groups, strict=True)]
        made = Auxiliary(model, branches, self.layers, self.maps, self.exponent, self.ship_joint).to(device)
        return made.train(model.training)

    def confusion(self, data: Data, device: torch.device) -> Tensor:
        """M, K×K, of the base network.

        Raises:
            UserError: it tells other classes apart, or confuses none.
        """
        classes = len(data.classes)
        said, label = stored(self.base) if isinstance(self.base, Path) else predicted(self.base, data, device)
        if said.shape[1] < classes or int(label.max()) >= classes:
            raise UserError(
                f"Autogenous: the base network tells {said.shape[1]} classes apart; the data have {classes}"
            )
        decided = said[:, :classes].argmax(1)
        counts = torch.bincount(label * classes + decided, minlength=classes**2).view(classes, classes)
        if not (decided != label).any():
            raise UserError(
                "Autogenous: the base network confuses no classes on these images; if it was trained on them, hold the"
                " same images out in both runs (hold_out)"
            )
        return counts

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Changes nothing.

        Raises:
            UserError: branches that ship were quantized, where no record of it can be kept.
        """
        network = auxiliary_in(model)
        parts = [] if network is None or not network.together else network.branches.modules()
        if any(isinstance(part, QuantLayer | QuantOutput) for part in parts):
            raise UserError("Autogenous: branches that ship stay float; list Quantize in front of Autogenous")
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        network = auxiliary_in(inner.model)
        if network is None:
            return step  # a peer of the network
        weights = [1.0] * len(self.layers) if self.branch_weights is None else self.branch_weights
        answers = zip(weights, network.said(), self.maps, strict=True)
        return step.add(
            **{
                f"groups_{number}": weight * nn.functional.cross_entropy(said, group_targets(step.batch.target, group))
                for number, (weight, said, group) in enumerate(answers, 1)
            }
        )

    def finish(self, model: nn.Module) -> nn.Module:
        """The network alone, or all with the joint prediction."""
        if self.ship_joint:
            return model
        for path, part in reversed(list(model.named_modules(remove_duplicate=False))):
            if isinstance(part, Auxiliary):
                model = swap(model, path, part.alone())
        return model

    def summary(self) -> str | None:
        """Which classes are in one group, at each layer."""
        if not self._names:
            return None
        rows = zip(self.layers, self.maps, strict=True)
        return "\n".join(f"Autogenous: {path} tells apart {members(group, self._names)}" for path, group in rows)

    def get_extra_state(self) -> Any:
        return {"maps": self.maps}

    def set_extra_state(self, state: Any) -> None:
        self.maps = [list(one) for one in state["maps"]]


@torch.no_grad()
def predicted(network: nn.Module, data: Data, device: torch.device) -> tuple[Tensor, Tensor]:
    """A network's scores for the validation images, N×K, and their labels."""
    normalize = getattr(network, "normalization", data.normalize).to(device)
    said, label = [], []
    with evaluating(network.to(device)):
        for batch in data.validation():
            said.append(scores_of(network(normalize(batch.input.to(device)))).cpu())
            label.append(batch.target.argmax(1))
    return torch.cat(said), torch.cat(label)


def stored(file: Path) -> tuple[Tensor, Tensor]:
    """Scores N×K and labels from a run's file of predictions.

    Raises:
        UserError: it is no such file.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["output"]), torch.from_numpy(arrays["target"]).long()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"Autogenous: base {file} is no file of predictions (predictions/model.npz of a run)"
        ) from error


def require_scores(model: nn.Module, image: Tensor, classes: int) -> None:
    """Refuses a network whose outputs are not one for each class: groups are of classes.

    Raises:
        UserError: saying so.
    """
    with evaluating(model), torch.no_grad():
        outputs = scores_of(model(image)).shape[1]
    if outputs != classes:
        raise UserError(
            f"Autogenous: {outputs} outputs for {classes} classes have no joint prediction; set ship_joint: false"
        )
