"""Norm decay: weights that make up a layer's l1 or l∞ operator norm are pulled towards zero, in every step.

Youwei Liang, Dong Huang, "Large Norms of CNN Layers Do Not Hurt Adversarial Robustness", AAAI 2021 (recalled),
arXiv:2009.08435.

Both norms are the largest of some sums of absolute weights (`galago.norms`, exact for every stride, padding and size of
image), so the signs of the weights in the largest sum are a sub-gradient. A buffer spreads it over the sums that were
the largest of late; it is added to the gradient of the task.

    G ← μ G,   then on the largest sum only   G ← sign(K);   ∇K ← ∇K + β G

When: instead of weight decay, to generalize a little better, or for layers that enlarge rounding errors less. It is no
defense against attacks: the paper's point is that small norms are neither necessary nor enough for robustness, and that
norm decay hurts it slightly. It costs a pass over the weights in each step and a copy of them.

Usual setting (official scripts): μ = 0.5, β from 1e-5 to 1e-1, no weight decay; SGD at 0.01 with momentum 0.9, ×0.1 at
epochs 75, 90 and 100 of 120, batch 128, CIFAR-10 in [0, 1] without mean and deviation.
Recipe: recipes/regularize/norm_decay_resnet20_cifar10.yaml.

Checked against the official code's numbers; its slips are not repeated (taps counted along the wrong axis, a sign taken
in place of the weight, layers with groups or small images left out). Chosen here: β = 1e-3. The term is added behind
clipping and accumulation, once a step, as weight decay is. BatchNorms are left alone, as in the paper; the norm is that
of the stored weight, in front of what follows (BatchNorm) and of rounding (quantizers). Layers that do not run when the
network predicts, or that pad with anything but zeros, are left alone. Where pruning has changed a weight's shape its
buffer begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.norms import L1, OperatorNorm
from galago.regularize.operators import Layers, Placed, weight_of


def refreshed(buffer: Tensor, weight: Tensor, largest: Tensor, momentum: float) -> Tensor:
    """G after a step, like the weight.

    Args:
        buffer: G before it.
        weight: K.
        largest: which weights are in the largest sum.
        momentum: μ.

    >>> refreshed(torch.ones(3), torch.tensor([-2.0, 3.0, 1.0]), torch.tensor([True, False, False]), 0.5)
    tensor([-1.0000,  0.5000,  0.5000])
    """
    return torch.where(largest, weight.sign(), momentum * buffer)


class NormDecay(Method):
    """Pulls down the operator norm of every convolution and linear layer.

    Args:
        weight: β, how much of the sub-gradient is added to the gradient.
        momentum: μ, how much of an older sub-gradient is left after a step.
        norm: `galago.norms.L1` or `galago.norms.Linf`.
    """

    def __init__(
        self,
        weight: float = 1e-3,
        momentum: float = 0.5,
        norm: OperatorNorm = L1(),  # noqa: B008 - has no state
    ) -> None:
        super().__init__()
        if weight < 0 or not 0 <= momentum < 1:
            raise UserError(f"NormDecay: weight {weight:g} must be 0 or more, momentum {momentum:g} in [0, 1)")
        self.weight, self.momentum, self.norm = weight, momentum, norm
        self.kept: dict[str, Tensor] = {}  # G by path; no buffers of PyTorch, as shapes may change in a training
        self._layers: Layers | None = None

    def get_extra_state(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def set_extra_state(self, state: Any) -> None:
        self.kept = dict(state["kept"])

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing in the model; finds out at which sizes its layers run.

        Raises:
            UserError: there is nothing whose norm could decay.
        """
        self._layers = Layers(model, data, "NormDecay")
        return model

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """Adds the sub-gradients in front of the optimizer's step."""
        assert self._layers is not None, "prepare comes first"
        for placed in self._layers.of(model):
            gradient = placed.layer.get_parameter("weight").grad
            if gradient is not None:
                gradient.add_(self._next_buffer(placed), alpha=self.weight)
        apply()

    @torch.no_grad()
    def _next_buffer(self, placed: Placed) -> Tensor:
        """G of a layer after this step; it begins with zeros wherever the weight has another shape than it had."""
        weight, before = weight_of(placed), self.kept.get(placed.path)
        if before is None or before.shape != weight.shape:
            before = torch.zeros_like(weight)
        largest = self.norm.maximal(weight, placed.operator)
        self.kept[placed.path] = refreshed(before.to(weight), weight, largest, self.momentum)
        return self.kept[placed.path]
