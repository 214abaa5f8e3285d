"""FFL: feature fusion learning, networks that teach each other through a classifier of all their features.

Jangho Kim, Minsung Hyun, Inseop Chung, Nojun Kwak, "Feature Fusion for Online Mutual Knowledge Distillation", ICPR
2020, arXiv:1904.09058.

N networks, or N branches of one, train at once. A small module fuses their last feature maps into one more classifier.
The ensemble of the N teaches it, and it teaches each of the N: no teacher has to be trained before.

    z_e = (1 / N) Σ_k z_k                                        a mean of scores, not of probabilities
    z_f = linear(pool(point-wise(depth-wise(F_1, …, F_N))))      each convolution with BatchNorm and ReLU
    D(s, a) = T² KL(softmax(a / T) + 1e-7 ‖ softmax(s / T))      a detached, mean over the batch
    L = Σ_k CE(z_k, y) + CE(z_f, y) + w(e) (D(z_f, z_e) + Σ_k D(z_k, z_f))
    w(e) = exp(-5 (1 - min(e, R) / R)²)                          (`galago.schedule.RampUp`)

When: a better small network from a single run, and a stronger one beside it that costs N times its last stage. Give
`branch_at` for branches of one network, whose first ships exactly as large as it was (`ship_fused`: all of them, with
the fused classifier); or `peers` for further networks of any architecture. List it behind `Quantize`: each branch then
has quantizers of its own, the fusion module none. In front of it, only the branch that ships is quantized.

Usual setting (public code for CIFAR-100, and the defaults): N = 2, T = 3, the ramp over 80 of 300 epochs, SGD at 0.1
with Nesterov momentum 0.9, a tenth from epochs 150 and 225 on, batch 128, decay 1e-4, 1e-5 for the fusion module.

Recipes: recipes/distill/ffl_resnet20_cifar10.yaml, recipes/distill/ffl_mixed_resnet20_cifar10.yaml (two architectures),
recipes/distill/ffl_w4a4_resnet20_cifar10.yaml.

Chosen here (the public code has two equal branches): maps of different sizes are averaged to the smallest height and
width, and the fused map is as wide as the narrowest. With more than two branches the trunk is taught by N + 1 heads:
lower the learning rate where it diverges. The ramp rises with every step instead of every epoch; where the model is
trained already it also keeps a fused classifier that knows nothing from pulling it down, so let it last some epochs.
The map of a network is what its last stage gives, unless named. What ships (`branch_1`, or the fused classifier) is the
step's output, which other methods see; its cross-entropy has no suffix. Which branch ships is decided beforehand, as
all begin alike: the first. With peers the model ships; to ship another, exchange the two. The fused map is what the
part `joint.fuse` of the network in training gives. Accuracies of all heads: `galago.distill.heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.distill.branches import branch, drawn_anew, fork_at, set_ranges
from galago.distill.divergence import SHIFT, softened_divergence
from galago.distill.ensemble import Ensemble, Joint, each_branch
from galago.distill.joint_training import (
    examples,
    in_every_branch,
    judged,
    require_answers,
    require_recorded,
    require_sensible,
    require_single,
    shipped,
)
from galago.distill.lesson import at
from galago.distill.sizes import to_one_size
from galago.errors import UserError
from galago.layers import tap
from galago.method import Forward, Method
from galago.probe import device_of, evaluating
from galago.quantize.quantizer import OwnRates
from galago.schedule import RampUp, Schedule
from galago.spec import describe
from galago.stages import stages
from galago.taps import Passed
from galago.task import scores_of


def mutual_divergences(branches: Sequence[Tensor], fused: Tensor, temperature: float) -> dict[str, Tensor]:
    """`D(z_f, z_e)` and every `D(z_k, z_f)`, scalars by who learns from whom.

    Args:
        branches: scores N×K of each network.
        fused: scores N×K of the fused classifier.
        temperature: T.

    >>> scores = torch.tensor([[1.0, 2.0]])
    >>> list(mutual_divergences([scores, scores], scores, 3.0))
    ['fused_from_ensemble', 'branch_1_from_fused', 'branch_2_from_fused']
    """
    ensemble = torch.stack(list(branches)).mean(0)
    found = {"fused_from_ensemble": softened_divergence(fused, ensemble, temperature, SHIFT)}
    for number, scores in enumerate(branches, 1):
        found[f"branch_{number}_from_fused"] = softened_divergence(scores, fused, temperature, SHIFT)
    return found


class Fusion(Joint):
    """The fused classifier: a depth-wise and a point-wise convolution over all networks' last maps.

    Args:
        channels: of each network's map.
        width: channels of the fused map.
        classes: number of outputs.
        weight_decay: of its own parameters.
    """

    title = "fused"

    def __init__(self, channels: Sequence[int], width: int, classes: int, weight_decay: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.width, self.classes, self.weight_decay = list(channels), width, classes, weight_decay
        total = sum(channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(total, total, 3, padding=1, groups=total, bias=False),
            nn.BatchNorm2d(total),
            nn.ReLU(),
            nn.Conv2d(total, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.linear = nn.Linear(width, classes)
        drawn_anew(self)
        with_decay(self, weight_decay)

    def forward(self, branches: list[Tensor], passed: list[Passed]) -> Tensor:
        maps = each_branch([one.given for one in passed], len(branches))
        fused = self.fuse(torch.cat(to_one_size(*maps), 1))
        scores: Tensor = self.linear(fused.mean((2, 3)))
        return scores


def with_decay(module: nn.Module, weight_decay: float) -> nn.Module:
    """The same, after every part of it has been given a weight decay of its own."""
    for part in module.modules():
        part.__dict__["own_rates"] = partial(OwnRates, weight_decay=weight_decay)
    return module


class FeatureFusion(Method):
    """Trains branches of the model, or further networks beside it, that learn from a classifier of all their features.

    Args:
        branch_at: layer from which on each branch has weights of its own, by path (`layer3`); none: give `peers`.
        branches: how many there are, the model's own included.
        peers: further complete networks for the same classes, instead of branches.
        features: layer that gives the last feature map before pooling: one path for branches, one for the model and
            each peer otherwise; by default the end of the last stage.
        width: channels of the fused map; the narrowest network's by default.
        temperature: softens what is compared.
        teaching_weight: w, of everything but the cross-entropies; a schedule gives it by progress.
        fusion_decay: weight decay of the fusion module.
        ship_fused: ship all networks with the fused classifier; else the first branch, or the model.
    """

    def __init__(
        self,
        branch_at: str | None = None,
        branches: int = 2,
        peers: Sequence[nn.Module] = (),
        features: Sequence[str] = (),
        width: int | None = None,
        temperature: float = 3.0,
        teaching_weight: float | Schedule = RampUp(),  # noqa: B008 - has no state
        fusion_decay: float = 1e-5,
        ship_fused: bool = False,
    ) -> None:
        super().__init__()
        if bool(branch_at) == bool(peers):
            raise UserError("FeatureFusion: give either branch_at (a layer such as `layer3`) or peers (networks)")
        require_sensible("FeatureFusion", branches, temperature)
        self.branch_at, self.branches, self.peers = branch_at, branches, list(peers)
        self.features, self.width, self.temperature = list(features), width, temperature
        self.teaching_weight, self.fusion_decay, self.ship_fused = teaching_weight, fusion_decay, ship_fused
        self._images, self._told = torch.empty(0), ""

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Puts an ensemble in the model's place.

        Raises:
            UserError: layers are not there, the network cannot be branched, or a peer does not fit.
        """
        require_single(model, "FeatureFusion")
        device = device_of(model)
        networks = [model, *(peer.to(device) for peer in self.peers)]
        self._images = examples(data, device, self.branches if self.branch_at else len(networks))
        paths = self.features or [last_map(network, self._images) for network in networks]
        joint = self._fusion(networks, paths).to(device)
        ensemble = self._branched(model, joint, paths[0], data) if self.branch_at else self._joined(model, joint, paths)
        require_answers(ensemble, self._images, "FeatureFusion", self.branch_at or paths[0])
        self._told += f"; {sum(map(Tensor.numel, joint.parameters())):,} parameters fuse {joint.channels} channels"
        return ensemble.train(model.training)

    def _fusion(self, networks: list[nn.Module], paths: list[str]) -> Fusion:
        if len(paths) != len(networks):
            raise UserError(f"FeatureFusion: features names {len(paths)} layers for {len(networks)} networks")
        looks = [look(*one, self._images) for one in zip(networks, paths, strict=True)]
        channels = [channels for channels, _ in looks] * (self.branches if self.branch_at else 1)
        joint = Fusion(channels, self.width or min(channels), looks[0][1], self.fusion_decay)
        if self.ship_fused:
            describe([joint, *self.peers])  # so that what cannot be written down is said before training
        return joint

    def _branched(self, model: nn.Module, joint: Fusion, path: str, data: Data) -> Ensemble:
        assert self.branch_at is not None
        places = fork_at(model, self.branch_at, self._images).places
        set_ranges(model, branch(model, places, self.branches, self.ship_fused), data)
        self._told = f"FeatureFusion: {self.branches} branches of {', '.join(places)}, which meet in {path}"
        watched = [f"layer.{one}" for one in in_every_branch(model, path)]
        return Ensemble(model, joint, self.branches, watched, together=self.ship_fused)

    def _joined(self, model: nn.Module, joint: Fusion, paths: list[str]) -> Ensemble:
        watched = [f"layer.{paths[0]}", *(f"peers.{number}.{path}" for number, path in enumerate(paths[1:]))]
        self._told = f"FeatureFusion: {len(paths)} networks, which meet in {', '.join(watched)}"
        return Ensemble(model, joint, len(paths), watched, self.peers, self.ship_fused)

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Changes nothing.

        Raises:
            UserError: what ships together was quantized where no record of it can be kept.
        """
        require_recorded(model, "FeatureFusion")
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step, heads = judged(inner(batch), inner)
        divergences = mutual_divergences(heads.branches, heads.joint, self.temperature)
        weight = at(self.teaching_weight, inner.progress)
        return step.add(**{name: weight * divergence for name, divergence in divergences.items()})

    def finish(self, model: nn.Module) -> nn.Module:
        """The first branch or the model alone, or all with the fused classifier."""
        return shipped(model, self._images)

    def summary(self) -> str | None:
        """Which layers are branched, and what fuses their maps."""
        return self._told or None


def last_map(network: nn.Module, images: Tensor) -> str:
    """Where the last stage ends.

    Raises:
        UserError: no layer gives a feature map.
    """
    with evaluating(network):
        found = stages(network, images)
    if not found:
        raise UserError(
            f"FeatureFusion: no layer of {type(network).__name__} gives a feature map with a height and a width;"
            " FFL fuses convolutional networks"
        )
    return found[-1]


def look(network: nn.Module, path: str, images: Tensor) -> tuple[int, int]:
    """How many channels the map at `path` has, and how many classes the network tells apart.

    Raises:
        UserError: there is no such layer, or it gives no map N×C×H×W.
    """
    with evaluating(network), torch.no_grad(), tap(network, path) as feature:
        answer = scores_of(network(images))
    if not isinstance(feature.value, Tensor) or feature.value.ndim != 4:
        raise UserError(f"FeatureFusion: features: {path!r} gives no feature map N×C×H×W; name a layer that does")
    return feature.value.shape[1], answer.shape[1]
