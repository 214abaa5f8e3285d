"""CompactStructure: a thinner network within a budget, block by block, under its own full network's eyes.

Waqar Ahmed, Andrea Zunino, Pietro Morerio, Vittorio Murino, "Compact CNN Structure Learning by Knowledge Distillation",
ICPR 2020, arXiv:2104.09191.

The strength of each channel is pressed by what it costs, block by block, until a share of the operations (or weights)
is left; dead channels are cut out, and the thinner network trains on. What blocks give is held close to what they gave
in the full network.

    L = L_task + β Σ_b mean (F_b - F_b^seed)² + Σ_b λ_b (Σ_{ℓ in b} R_ℓ) / C_0        mean over alive channels
    after each epoch      λ_b ← clip(λ_b exp(η (c_b - ρ_b)), λ_min, λ_max)   where c_b > ρ_b, else it stays
    in each step          λ_b counts only while c_b > ρ_b

R_ℓ is the cost's regularizer (`galago.prune.cost`), C_0 the cost of the full network, c_b the share of a block's cost
that is left, ρ_b its target. A channel is as strong as |γ| of its BatchNorm, or as the norm of its filter where none
follows. Channels that meet in a residual sum or a depth-wise convolution are one group, as strong as its strongest
member, which is alive above θ and goes as a whole.

When: a trained network that is too large, whatever engine runs it; quantize in a second run that starts from this one
(`galago.run.load`). It costs a pass of the full network in each step (none with `hint: 0`), and nothing later. List it
before `Distill` with the full network as teacher and `SoftTargets`, which is the paper's distillation; lessons that
build adapters for the model's widths (`Hints`, `SolutionFlow`) do not outlive the cut.

Usual setting: θ = 0.01, β = 1, η = 0.5; structure learning in the first 20 to 30 % of the epochs, at a constant rate of
0.01; T = 4 and weight 0.9 in `SoftTargets`, `task_weight` 0.1 in `Distill`. In a short training (less than some
thousand steps of structure learning) a `pressure` of 1. Recipe: recipes/prune/compact_resnet20_cifar10.yaml.

Only the paper's abstract could be had: block-wise structure learning with distillation under a budget. Regularizer and
groups are MorphNet's (but a depth-wise layer counts once), on which the paper is recalled to build; blocks, control and
hints are design choices. Chosen here: λ starts where the regularizer is a tenth of the loss, and is at most 1, where it
is about twice the full network's |γ|; beyond, all channels shrink together before the first is dead. What is missing to
a target when structure learning ends is met by cutting the weakest groups that are left in that block; the strongest
group of each layer always stays. Nothing makes up for the shifts of channels that are cut but the training that
follows. Factors and shifts of BatchNorms do not decay, or they would be pressed twice. Hints go on after the cut, for
the channels that are left, at blocks that give a map. The optimizer forgets what it knew of tensors that were cut. A
training that ends before the cut is cut at its end, and not trained further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.batch import Batch, Step
from galago.console import say
from galago.data import Data
from galago.errors import UserError
from galago.layers import find, innermost
from galago.method import Forward, Method
from galago.probe import device_of, normalized
from galago.prune.blocks import Block, shared_out, shares, table
from galago.prune.cost import Operations, Resource
from galago.prune.full import FullNetwork
from galago.prune.groups import strengths
from galago.prune.surgery import narrow
from galago.prune.survey import survey
from galago.quantize.quantizer import Quantizer

UNSET = -1.0  # a strength before the first step


def controlled(strength: Tensor, left: Tensor, target: Tensor, eta: float, lowest: float, highest: float) -> Tensor:
    """λ of each block after an epoch: `clip(λ exp(η (c - ρ)), λ_min, λ_max)` where c > ρ, unchanged elsewhere.

    Args:
        strength: λ, B.
        left: c, B.
        target: ρ, B.
        eta: η.
        lowest: λ_min.
        highest: λ_max.

    >>> controlled(torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.5]), 0.5, 0.0, 9.0)
    tensor([1.2214, 1.0000])
    """
    return torch.where(left > target, (strength * torch.exp(eta * (left - target))).clamp(lowest, highest), strength)


def applied(strength: Tensor, left: Tensor, target: Tensor) -> Tensor:
    """λ that counts, B: none where the target is met.

    >>> applied(torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.5]))
    tensor([1., 0.])
    """
    return strength * (left > target)


def hint_loss(feature: Tensor, wanted: Tensor, alive: Tensor) -> Tensor:
    """`mean (F - F^seed)²` over images, places and the channels that are alive; 0 where none is.

    Args:
        feature: F, N×C×H×W.
        wanted: F^seed, likewise.
        alive: ones and zeros, C.

    >>> hint_loss(torch.ones(1, 2, 1, 1), torch.tensor([3.0, 9.0]).view(1, 2, 1, 1), torch.tensor([1.0, 0.0]))
    tensor(4.)
    """
    error = (feature - wanted).square().mean((0, 2, 3))
    return (error * alive).sum() / alive.sum().clamp_min(1)


class CompactStructure(Method):
    """Presses channels until a budget is met, block by block, cuts them out and trains on.

    Args:
        budget: share of the cost that is to be left, of every block that has no target of its own.
        resource: what costs: `galago.prune.cost.Operations` or `galago.prune.cost.Parameters`.
        blocks: parts of the network with targets or strengths of their own; the rest goes by its direct children.
        until: share of the training by whose end the structure is to be known; it ends earlier where all targets are
            met, and 0 cuts before the first step.
        threshold: θ, up to which a channel's strength is that of a dead one.
        pressure: how large the regularizer is at the start, as a share of the loss: it sets λ.
        rate: η, how fast λ grows while a target is not met.
        lowest: λ_min.
        highest: λ_max.
        hint: β, of the features' loss; 0 does without, and without the full network's pass.
    """

    strength: Tensor

    def __init__(
        self,
        budget: float = 0.5,
        resource: Resource = Operations(),  # noqa: B008 - has no state
        blocks: Sequence[Block] = (),
        until: float = 0.3,
        threshold: float = 0.01,
        pressure: float = 0.1,
        rate: float = 0.5,
        lowest: float = 1e-4,
        highest: float = 1.0,
        hint: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < budget <= 1:
            raise UserError(f"CompactStructure: budget is {budget}; give the share of the cost that is to be left")
        if not 0 <= until <= 1:
            raise UserError(f"CompactStructure: until is {until}; give a share of the training, from 0 to 1")
        if pressure <= 0 or not 0 < lowest <= highest:
            raise UserError("CompactStructure: pressure has to be above 0, and lowest too, and at most highest")
        if threshold < 0 or hint < 0:
            raise UserError("CompactStructure: threshold and hint have to be 0 or more")
        self.budget, self.resource, self.blocks, self.until = budget, resource, tuple(blocks), until
        self.threshold, self.pressure, self.rate = threshold, pressure, rate
        self.lowest, self.highest, self.hint = lowest, highest, hint
        self.kept: Tensor | None = None  # which groups are left, once that is known
        self.now, self.next = 0.0, 0.0  # progress of this step, and of the one after it
        self.full: FullNetwork | None = None

    def get_extra_state(self) -> dict[str, Any]:
        return {"kept": self.kept, "now": self.now, "next": self.next}

    def set_extra_state(self, state: Any) -> None:
        self.kept, self.now, self.next = state["kept"], float(state["now"]), float(state["next"])

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Finds groups and blocks, and keeps a copy of the full network; on resume cuts again what was cut.

        Raises:
            UserError: the network is quantized, nothing of it can be cut, or a target cannot be met.
        """
        require_float(model)
        image = normalized(data, data.example()[:1], device_of(model))
        self.groups = survey(model, image)
        if self.groups.count == 0:
            raise UserError(f"CompactStructure finds no channel that it could cut: {self.groups.reasons()}")
        self.parts, self.exact = shared_out(model, self.groups, self.resource, self.blocks, self.budget)
        self.fast = self.exact.relative().to(image)
        by_hand = [UNSET if part.strength is None else part.strength for part in self.parts]
        self.register_buffer("strength", torch.tensor(by_hand).to(image))
        maps = {part.path: self.groups.maps[part.path] for part in self.parts if part.path in self.groups.maps}
        if self.hint > 0 and maps:
            self.full = FullNetwork(model, maps, image)
        for norm in self._norms(model):
            norm.__dict__["own_rates"] = without_decay
        if self.kept is not None:
            if len(self.kept) != self.groups.count:
                raise UserError("CompactStructure: the checkpoint is of another network; delete it to start over")
            self._narrow(model, self.kept)
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        if self.kept is None:
            require_float(model)
            gates, alive = self._measured(model)
            left = self.exact.left(alive)
            if epoch > 0:
                self._control(left.to(self.strength))
            if self.next >= self.until - 1e-6 or bool((left <= self.exact.target).all()):
                self._cut(model, gates, alive)
            else:
                self._say("alive", alive)
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = plain = inner(batch)
        alive = self.strength.new_ones(self.groups.count)
        if self.kept is None:
            gates = strengths(inner.model, self.groups)
            alive = self.fast.costs.alive(gates.detach(), self.threshold)
            step = step.add(resource=self._pressure(gates, alive, plain.loss.detach()))
        if self.full is not None:
            step = step.add(hint=self.hint * self._hints(self.full, step.batch.input, alive))
        if inner.progress > self.now:  # else it is the same batch once more
            self.now, self.next = inner.progress, 2 * inner.progress - self.now
        return step

    def finish(self, model: nn.Module) -> nn.Module:
        """Cuts if that is still to be done, and takes all else away."""
        if self.kept is None:
            require_float(model)
            self._cut(model, *self._measured(model))
        if self.full is not None:
            self.full.release(model)
        for norm in self._norms(model):
            norm.__dict__.pop("own_rates", None)
        return model

    def summary(self) -> Table:
        """The blocks with their costs and targets, and what is left whole."""
        return table(self.parts, self.exact, self.groups, self.resource.unit)

    def _norms(self, model: nn.Module) -> list[nn.Module]:
        modules = [innermost(find(model, gate.module)) for gate in self.groups.gates]
        return [module for module in modules if isinstance(module, _BatchNorm)]

    def _measured(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """g and a of each group, on the host in float64."""
        gates = strengths(model, self.groups).detach().double().cpu()
        return gates, self.exact.costs.alive(gates, self.threshold)

    def _control(self, left: Tensor) -> None:
        """λ after an epoch; those given by hand stay."""
        moved = controlled(self.strength, left, self.fast.target, self.rate, self.lowest, self.highest)
        free = torch.tensor([part.strength is None for part in self.parts], device=moved.device)
        self.strength.copy_(torch.where(free, moved, self.strength))

    def _pressure(self, gates: Tensor, alive: Tensor, loss: Tensor) -> Tensor:
        """`Σ_b λ_b (Σ_{ℓ in b} R_ℓ) / C_0`; in the first step λ is set by the loss."""
        parts = self.fast.of_blocks(self.fast.costs.regularizer(alive, gates))
        start = self.pressure * loss / parts.detach().sum().clamp_min(1e-12)
        start = start.clamp(self.lowest, self.highest)
        self.strength.copy_(torch.where(self.strength == UNSET, start, self.strength))
        return (applied(self.strength, self.fast.left(alive), self.fast.target) * parts).sum()

    def _hints(self, full: FullNetwork, image: Tensor, alive: Tensor) -> Tensor:
        """The sum of the hints of all blocks that give a map."""
        every = torch.cat([alive, alive.new_ones(1)])  # last, those of no group
        pairs = full.pairs(image)
        return torch.stack([hint_loss(pair.feature, pair.wanted, every[pair.groups]) for pair in pairs]).sum()

    def _cut(self, model: nn.Module, gates: Tensor, alive: Tensor) -> None:
        left = self.exact.trimmed(gates, alive)
        self.kept = left > 0
        self._narrow(model, self.kept)
        self._say("left", left)

    def _narrow(self, model: nn.Module, kept: Tensor) -> None:
        narrow(model, self.groups, kept)
        if self.full is not None:
            self.full.narrow(kept)

    def _say(self, what: str, alive: Tensor) -> None:
        say(f"CompactStructure: {self.resource.unit} {what}: {shares(self.parts, self.exact, alive)}")


def without_decay() -> tuple[float, float]:
    """The rates of a BatchNorm: as fast as all else, without weight decay."""
    return 1.0, 0.0


def require_float(model: nn.Module) -> None:
    """Sees to it that nothing is quantized, whose ranges would not fit what is left.

    Raises:
        UserError: something is.
    """
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise UserError(
            "CompactStructure cuts float networks: leave Quantize out here, and quantize in a second run whose model is"
            " {class_path: galago.run.load, init_args: {run: …}}"
        )
