"""Projection of norms: after each step, no BatchNorm factor and no layer's largest sum is above its limit for long.

Youwei Liang, Dong Huang, "Large Norms of CNN Layers Do Not Hurt Adversarial Robustness", AAAI 2021 (recalled),
arXiv:2009.08435.

The hard neighbor of `galago.regularize.norm_decay`. Behind the optimizer's step the one channel, column or row of each
layer that is the largest is put back where it is above the limit; the next largest has its turn in the next step.

    BatchNorm   c = argmax |γ| / √(σ² + ε):   γ_c ← 5 √(σ_c² + ε) sign(γ_c)              where it is above 5
    weight      v = the weights of the largest sum (`galago.norms`):   v ← sign(v) relu(|v| - θ)   where Σ|v| > τ
                θ = (Σ_(i<=ρ) |v|_(i) - τ) / ρ,   ρ = the largest j with |v|_(j) > (Σ_(i<=j) |v|_(i) - τ) / j

The second is the Euclidean projection onto the l1 ball of radius τ; it makes weights exactly zero, as pruning does.

When: to bound what a network can make of a rounding error; list it behind `NormDecay`, or without it. It costs a pass
over the weights in each step, and a sort of them with a radius.

Usual setting (official scripts): factors of BatchNorms are limited to 5, weights are not projected. No recipe yet.

Checked against the official code's numbers. Chosen here: one limit for all layers; momentum of the optimizer is left as
it is. As in norm decay, layers that do not run when the network predicts are left alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.norms import L1, OperatorNorm, channel_factors
from galago.regularize.operators import Layers, weight_of


def onto_ball(v: Tensor, radius: float, chosen: Tensor | None = None) -> Tensor:
    """The nearest v, of the same shape, whose absolute values add up to `radius` at most.

    Args:
        v: any shape.
        radius: τ.
        chosen: which of its elements count and move; all of them where there is none.

    >>> onto_ball(torch.tensor([3.0, -2.0, 0.5]), 3.0)
    tensor([ 2., -1.,  0.])
    """
    size = v.abs() if chosen is None else v.abs() * chosen
    falling = size.flatten().sort(descending=True).values
    excess = (falling.cumsum(0) - radius) / torch.arange(1, len(falling) + 1, device=v.device)
    last = (falling > excess).sum() - 1  # ρ - 1
    theta = excess.gather(0, last.view(1)).clamp_min(0)
    moved = v.sign() * (size - theta).relu()
    return moved if chosen is None else torch.where(chosen, moved, v)


@torch.no_grad()
def limit_factor(norm: nn.Module, limit: float) -> None:
    """Puts the channel of a BatchNorm with the largest |γ| / √(σ² + ε) back to `limit`, where it is above."""
    gamma, factors = norm.get_parameter("weight"), channel_factors(norm)
    worst = torch.zeros_like(factors).scatter(0, factors.argmax(0, keepdim=True), 1.0) > 0
    gamma.copy_(torch.where(worst & (factors > limit), gamma * limit / factors, gamma))


class ProjectNorm(Method):
    """Puts BatchNorm factors, and the largest sums of weights, back to a limit behind every step.

    Args:
        limit: of BatchNorm factors |γ| / √(σ² + ε); None leaves them alone.
        radius: τ, of every layer's norm; None leaves weights alone.
        norm: `galago.norms.L1` or `galago.norms.Linf`, of what has the radius.
    """

    def __init__(
        self,
        limit: float | None = 5.0,
        radius: float | None = None,
        norm: OperatorNorm = L1(),  # noqa: B008 - has no state
    ) -> None:
        super().__init__()
        if limit is None and radius is None:
            raise UserError("ProjectNorm: limit and radius are both null, so nothing is limited; give one of them")
        for name, value in (("limit", limit), ("radius", radius)):
            if value is not None and value <= 0:
                raise UserError(f"ProjectNorm: {name} is {value:g}; give a number above 0, or null for none")
        self.limit, self.radius, self.norm = limit, radius, norm
        self._layers: Layers | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing in the model; finds out at which sizes its layers run."""
        if self.radius is not None:
            self._layers = Layers(model, data, "ProjectNorm")
        return model

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """Projects behind the optimizer's step."""
        apply()
        if self.limit is not None:
            for norm in batch_norms(model):
                limit_factor(norm, self.limit)
        if self._layers is not None and self.radius is not None:
            for placed in self._layers.of(model):
                weight = weight_of(placed)
                weight.copy_(onto_ball(weight, self.radius, self.norm.maximal(weight, placed.operator)))


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorms that learn a factor and keep statistics."""
    return [
        norm
        for norm in model.modules()
        if isinstance(norm, _BatchNorm)
        and norm.affine
        and norm.running_var is not None
        and norm.get_parameter("weight").requires_grad
    ]
