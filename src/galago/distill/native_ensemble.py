"""ONE: knowledge distillation by an on-the-fly native ensemble; branches of one network learn from their gated sum.

Xu Lan, Xiatian Zhu, Shaogang Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018,
arXiv:1806.04606.

The last layers of a network are there m times behind one trunk. A gate weighs the branches image by image; what they
then say together is the teacher of each of them, in the same run.

    g = softmax(ReLU(BatchNorm(linear(pool(trunk)))))                   m weights an image
    z_e = Σ_i g_i z_i
    D(s, a) = T² KL(softmax(a / T) + 1e-7 ‖ softmax(s / T))             a detached, mean over the batch
    L = Σ_i CE(z_i, y) + CE(z_e, y) + w(e) Σ_i D(z_i, z_e)
    w(e) = exp(-5 (1 - min(e, R) / R)²)                                 (`galago.schedule.RampUp`)

When: as `galago.distill.feature_fusion`, from which it differs by the teacher, a weighted mean instead of a classifier
of its own. The gate learns from the cross-entropy of its answer alone. Training costs m times the last layers; the
first branch ships, exactly as large as the network was (`ship_ensemble`: all of them with the gate). List it behind
`Quantize`: each branch then has quantizers of its own, the gate none.

Usual setting (public code for CIFAR, and the defaults): m = 3, branches from the last stage on, T = 3, the ramp over 80
of 300 epochs, plain SGD at 0.1 with momentum 0.9, a tenth from epochs 150 and 225 on, batch 128, decay 1e-4.

Recipe: recipes/distill/one_resnet20_cifar10.yaml.

Chosen here: what ships is the step's output, which other methods see; its cross-entropy has no suffix. The ramp rises
with every step instead of every epoch. Accuracies of all branches and of their sum: `galago.distill.heads`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.distill.branches import branch, fork_at, set_ranges
from galago.distill.divergence import SHIFT, softened_divergence
from galago.distill.ensemble import Ensemble, Joint
from galago.distill.joint_training import (
    examples,
    judged,
    require_answers,
    require_recorded,
    require_sensible,
    require_single,
    shipped,
)
from galago.distill.lesson import at, pooled
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import device_of
from galago.schedule import RampUp, Schedule
from galago.taps import Passed


def gated(branches: Sequence[Tensor], gate: Tensor) -> Tensor:
    """`Σ_i g_i z_i`, N×K.

    Args:
        branches: m tensors of scores N×K.
        gate: N×m, each row of sum 1.

    >>> gated([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])], torch.tensor([[0.25, 0.75]]))
    tensor([[0.2500, 1.5000]])
    """
    return (torch.stack(list(branches), 1) * gate[:, :, None]).sum(1)


def branch_divergences(branches: Sequence[Tensor], teacher: Tensor, temperature: float) -> dict[str, Tensor]:
    """Every `D(z_i, z_e)`, scalars by who learns from whom.

    >>> list(branch_divergences([torch.zeros(1, 2)] * 2, torch.zeros(1, 2), 3.0))
    ['branch_1_from_gated', 'branch_2_from_gated']
    """
    return {
        f"branch_{number}_from_gated": softened_divergence(scores, teacher, temperature, SHIFT)
        for number, scores in enumerate(branches, 1)
    }


class Gate(Joint):
    """Weighs the branches by what comes out of the trunk.

    Args:
        channels: of the trunk's output.
        count: how many branches there are.
    """

    title = "gated"

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.channels, self.count = channels, count
        self.linear, self.norm = nn.Linear(channels, count), nn.BatchNorm1d(count)

    def weigh(self, trunk: Tensor) -> Tensor:
        """g, N×m, of the trunk's output."""
        weights: Tensor = self.norm(self.linear(pooled(trunk))).relu().softmax(1)
        return weights

    def forward(self, branches: list[Tensor], passed: list[Passed]) -> Tensor:
        return gated(branches, self.weigh(passed[0].taken))


class NativeEnsemble(Method):
    """Trains branches of the model that learn from their gated sum.

    Args:
        branch_at: layer from which on each branch has weights of its own, by path (`layer3`).
        branches: m, the model's own included.
        temperature: softens what is compared.
        teaching_weight: w, of everything but the cross-entropies; a schedule gives it by progress.
        ship_ensemble: ship all branches with the gate; else the first branch.
    """

    def __init__(
        self,
        branch_at: str,
        branches: int = 3,
        temperature: float = 3.0,
        teaching_weight: float | Schedule = RampUp(),  # noqa: B008 - has no state
        ship_ensemble: bool = False,
    ) -> None:
        super().__init__()
        require_sensible("NativeEnsemble", branches, temperature)
        self.branch_at, self.branches, self.temperature = branch_at, branches, temperature
        self.teaching_weight, self.ship_ensemble = teaching_weight, ship_ensemble
        self._images, self._told = torch.empty(0), ""

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Puts an ensemble in the model's place.

        Raises:
            UserError: there is no such layer, or the network cannot be branched there.
        """
        require_single(model, "NativeEnsemble")
        device = device_of(model)
        self._images = examples(data, device, self.branches)
        if data.batch_size < 2:
            raise UserError("NativeEnsemble: the gate's BatchNorm needs two images a batch; make batch_size larger")
        fork = fork_at(model, self.branch_at, self._images)
        gate = Gate(pooled(fork.trunk).shape[1], self.branches).to(device)
        set_ranges(model, branch(model, fork.places, self.branches, self.ship_ensemble), data)
        watched = [f"layer.{fork.places[0]}"]
        ensemble = Ensemble(model, gate, self.branches, watched, together=self.ship_ensemble)
        require_answers(ensemble, self._images, "NativeEnsemble", self.branch_at)
        self._told = f"NativeEnsemble: {self.branches} branches of {', '.join(fork.places)}"
        return ensemble.train(model.training)

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Changes nothing.

        Raises:
            UserError: what ships together was quantized where no record of it can be kept.
        """
        require_recorded(model, "NativeEnsemble")
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step, heads = judged(inner(batch), inner)
        divergences = branch_divergences(heads.branches, heads.joint, self.temperature)
        weight = at(self.teaching_weight, inner.progress)
        return step.add(**{name: weight * divergence for name, divergence in divergences.items()})

    def finish(self, model: nn.Module) -> nn.Module:
        """The first branch alone, or all with the gate."""
        return shipped(model, self._images)

    def summary(self) -> str | None:
        """Which layers are branched."""
        return self._told or None
