"""What a network costs with any of its channels: operations or parameters, layer by layer, exact.

Ariel Gordon, Elad Eban, Ofir Nachum, Bo Chen, Hao Wu, Tien-Ju Yang, Edward Choi, "MorphNet: Fast & Simple
Resource-Constrained Structure Learning of Deep Networks", CVPR 2018, arXiv:1711.06798, whose regularizer this is.

A layer ℓ costs its coefficient κ for each pair of channels that it connects; a channel counts while it is alive. The
regularizer is made so that its gradient in a channel's gate is what the channel costs with its layers as they are:

    a = 1[g > θ]       cost_ℓ = κ_ℓ Σ a_in Σ a_out       R_ℓ = κ_ℓ (Σ a_in Σ g_out + Σ a_out Σ g_in)
    κ = 2 k_h k_w H_out W_out  (operations)      κ = k_h k_w  (parameters)

Gates g are those of groups, the largest among a group's members. A channel that cannot be removed has a = 1 and g = 0.
A depth-wise layer has one input channel that is always there, so that cost = κ Σ a and R = κ Σ g. A transposed
convolution has H_in W_in in the place of H_out W_out, a linear layer 1 (or the number of its tokens).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from galago.prune.groups import ALWAYS, Groups, Layer


class Resource(ABC):
    """What is to be saved."""

    unit: str

    @abstractmethod
    def coefficient(self, layer: Layer) -> int:
        """κ: what one pair of an input and an output channel costs."""


class Operations(Resource):
    """Multiplications and additions for one image (twice the multiply-accumulates)."""

    unit = "operations"

    def coefficient(self, layer: Layer) -> int:
        return 2 * layer.kernel * layer.positions


class Parameters(Resource):
    """Weights of convolutions and linear layers; biases and BatchNorm count nothing."""

    unit = "weights"

    def coefficient(self, layer: Layer) -> int:
        return layer.kernel


class Costs(NamedTuple):
    """What L layers cost, by the G groups whose channels they read and make."""

    kappa: Tensor  # L
    reads: Tensor  # L×G: input channels of each group
    makes: Tensor  # L×G: output channels of each group
    read_always: Tensor  # L: input channels of no group
    made_always: Tensor  # L

    def cost(self, alive: Tensor) -> Tensor:
        """κ Σ a_in Σ a_out of each layer, L.

        Args:
            alive: a for each group, G: ones and zeros.
        """
        return self.kappa * self.taken(alive) * self.made(alive)

    def regularizer(self, alive: Tensor, gates: Tensor) -> Tensor:
        """κ (Σ a_in Σ g_out + Σ a_out Σ g_in) of each layer, L.

        Args:
            alive: G, taken as constant.
            gates: g, G.
        """
        strength_out, strength_in = (self.makes * gates).sum(1), (self.reads * gates).sum(1)
        return self.kappa * (self.taken(alive) * strength_out + self.made(alive) * strength_in)

    def taken(self, alive: Tensor) -> Tensor:
        """Σ a_in of each layer, L."""
        return (self.reads * alive).sum(1) + self.read_always

    def made(self, alive: Tensor) -> Tensor:
        """Σ a_out of each layer, L."""
        return (self.makes * alive).sum(1) + self.made_always

    def alive(self, gates: Tensor, threshold: float) -> Tensor:
        """a: which groups are alive, G, as ones and zeros of the gates' kind.

        A layer without any channel would cut the network in two, so that each keeps its strongest group.
        """
        strongest = torch.where(self.makes > 0, gates, -1.0).argmax(1, keepdim=True)
        needy = (self.made_always == 0) & (self.makes > 0).any(1)
        needed = (strongest == torch.arange(len(gates), device=gates.device)) & needy[:, None]
        return ((gates > threshold) | needed.any(0)).to(gates.dtype)

    def to(self, like: Tensor) -> Costs:
        """The same on another tensor's device and in its precision."""
        return Costs(*(tensor.to(like) for tensor in self))


def costs_of(groups: Groups, resource: Resource) -> Costs:
    """In float64, which is exact."""
    kappa = torch.tensor([resource.coefficient(layer) for layer in groups.layers], dtype=torch.float64)
    reads, makes = (
        torch.stack([_counts(channels, groups.count) for channels in side])
        for side in ([layer.inputs for layer in groups.layers], [layer.outputs for layer in groups.layers])
    )
    return Costs(kappa, reads[:, :-1], makes[:, :-1], reads[:, -1], makes[:, -1])


def _counts(channels: Tensor, count: int) -> Tensor:
    """How many channels each group has here, G, and last how many have none."""
    return torch.bincount(channels.where(channels != ALWAYS, count), minlength=count + 1).double()
