"""Auxiliary branches that tell groups of classes apart, and the network that carries them.

An `Auxiliary` takes the network's place in training. Small branches read what some of its layers give out and say
which group of classes an image belongs to. The network's own answer stays the output, so that tasks, probes and other
methods see nothing unusual; whoever trains the branches asks afterwards what they said. In evaluation mode it computes
what will ship: the network alone, or, `together`, the joint prediction of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.layers import Wrapper, find, removing
from galago.probe import evaluating
from galago.taps import Held, unwatch
from galago.task import scores_of


def joint_scores(scores: Tensor, branches: Sequence[Tensor], groups: Sequence[Tensor], exponent: float) -> Tensor:
    """`log P(c)`, N×K, of `P(c) ∝ softmax(z)_c Π_i softmax(a_i)_{g_i(c)}^e`; softmax gives P back.

    Args:
        scores: z, N×K.
        branches: a_i, N×G_i each.
        groups: g_i, the group of each class, K integers each.
        exponent: e.

    >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.8]])
    >>> joint_scores(p.log(), [q.log()], [torch.tensor([0, 1, 1])], 0.5).exp()
    tensor([[0.3333, 0.4000, 0.2667]])
    """
    total = scores.log_softmax(1)
    for branch, group in zip(branches, groups, strict=True):
        total = total + exponent * branch.log_softmax(1)[:, group]
    return total.log_softmax(1)


class Branch(nn.Sequential):
    """Two depthwise-separable 3×3 convolutions, the first strided and to twice the channels, and a linear layer.

    Args:
        channels: of what it reads.
        groups: number of outputs.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.channels, self.groups = channels, groups
        self.first = separable(channels, 2 * channels, stride=2)
        self.second = separable(2 * channels, 2 * channels)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(2 * channels, groups)


def separable(channels: int, outputs: int, stride: int = 1) -> nn.Module:
    """A convolution of each channel by itself, and one that mixes them, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Heads(NamedTuple):
    """What everyone said of a batch."""

    main: Tensor  # N×K
    branches: list[Tensor]  # N×G each
    joint: Tensor  # N×K


class Auxiliary(Wrapper):
    """A network with branches that tell groups of classes apart.

    Args:
        layer: the network.
        branches: one for each place.
        places: paths of the network's layers that the branches read.
        groups: the group of each class, for each branch.
        exponent: how much the branches' word counts in the joint prediction.
        together: give the joint prediction in evaluation mode; else the network's own.
    """

    def __init__(
        self,
        layer: nn.Module,
        branches: Sequence[nn.Module],
        places: Sequence[str],
        groups: Sequence[Sequence[int]],
        exponent: float = 0.3,
        together: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.branches = nn.ModuleList(branches)
        self.layer = layer  # behind the branches, so that the last linear layer is still the network's classifier
        self.places, self.groups = list(places), [list(one) for one in groups]
        self.exponent, self.together = exponent, together
        for number, one in enumerate(self.groups):
            self.register_buffer(f"group_{number}", torch.tensor(one), persistent=False)
        self._held, self._said = [Held() for _ in places], Held()
        for place, held in zip(places, self._held, strict=True):
            find(layer, place).register_forward_hook(held.keep)

    def forward(self, x: Tensor) -> Any:
        output, maps = self.layer(x), self._look
        if self.training:
            self._said.value = self._heard(maps())
            return output
        if not self.together:
            maps()
            return output
        joint = self.joint(scores_of(output), self._heard(maps()))
        return output | {"main": joint} if isinstance(output, dict) else joint

    def heads(self, x: Tensor) -> Heads:
        """What everyone says of a batch, in whatever mode."""
        main = scores_of(self.layer(x))
        branches = self._heard(self._look())
        return Heads(main, branches, self.joint(main, branches))

    def said(self) -> list[Tensor]:
        """What the branches said in the last training pass, N×G each; it is forgotten then."""
        branches: list[Tensor] = self._said.take()
        return branches

    def joint(self, scores: Tensor, branches: Sequence[Tensor]) -> Tensor:
        """The joint prediction, N×K."""
        groups = [self.get_buffer(f"group_{number}") for number in range(len(self.groups))]
        return joint_scores(scores, branches, groups, self.exponent)

    def _look(self) -> list[Tensor]:
        return [held.take().given for held in self._held]

    def _heard(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [branch(one) for branch, one in zip(self.branches, maps, strict=True)]

    def alone(self) -> nn.Module:
        """The network without branches, and without whoever watches it for them."""
        unwatch(self.layer, self._held)
        return self.layer


def auxiliary_in(model: nn.Module) -> Auxiliary | None:
    """The network with branches that a model is, or is wrapped around."""
    return next((part for part in model.modules() if isinstance(part, Auxiliary)), None)


def channels_at(model: nn.Module, path: str, image: Tensor, whose: str) -> int:
    """How many channels a layer gives out.

    Args:
        model: in any mode.
        path: of the layer.
        image: normalized, N×C×H×W.
        whose: method that asks, for the message.

    Raises:
        UserError: there is no such layer, or nothing that a branch could read.
    """
    seen: list[tuple[Any, int]] = []

    def note(module: nn.Module, inputs: object, output: Any) -> None:
        seen.append((output, getattr(output, "_version", 0)))

    with removing([find(model, path).register_forward_hook(note)]), evaluating(model), torch.no_grad():
        model(image)
    if len(seen) != 1 or not isinstance(seen[0][0], Tensor) or seen[0][0].ndim != 4:
        raise UserError(f"{whose}: layer {path!r} does not give one feature map in a pass; name a stage of the network")
    if seen[0][0]._version != seen[0][1]:
        raise UserError(
            f"{whose}: what layer {path!r} gives is changed in place behind it; name the layer that does so"
        )
    return int(seen[0][0].shape[1])
