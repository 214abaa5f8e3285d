"""The full network as it was before anything was cut, for what a pruner compares the cut one with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from galago.probe import evaluating
from galago.prune.surgery import left_of
from galago.taps import Taps


class Pair(NamedTuple):
    """What a layer gives, of both networks, with the channels that the cut one has left."""

    feature: Tensor  # N×C×H×W, of the network that trains
    wanted: Tensor  # likewise, of the full network
    groups: Tensor  # of each channel, C; -1 for one that cannot be removed


class FullNetwork(nn.Module):
    """A frozen copy of a network, which looks at the maps of both.

    Args:
        model: with all its channels; watched until `release`.
        maps: of layers whose maps are compared, by path: the group of each channel.
        image: normalized, to see what the layers give.
    """

    def __init__(self, model: nn.Module, maps: dict[str, Tensor], image: Tensor) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.network.modules():
            module._forward_hooks.clear()  # which watch the model, not its copy
        self.maps = maps
        self.left: dict[str, Tensor] = {}  # places of the channels that are left, where some are not
        self.groups = {path: groups.to(image.device) for path, groups in maps.items()}
        self.taps = Taps(model, maps), Taps(self.network, maps)
        with evaluating(model), torch.no_grad():
            model(image)
            self.network(image)
        for taps, whose in zip(self.taps, ("the model", "the full network"), strict=True):
            taps.check(whose)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def narrow(self, kept: Tensor) -> None:
        """Says which groups the model has left: a boolean for each."""
        for path, groups in self.maps.items():
            left = left_of(groups, kept).nonzero().flatten().to(self.groups[path].device)
            self.left[path], self.groups[path] = left, self.groups[path][left]

    def pairs(self, image: Tensor) -> Iterator[Pair]:
        """The maps of the model's last pass, and those of the full network for the same images.

        Args:
            image: what the model saw.
        """
        with torch.no_grad():
            self.network(image)
        own, full = (taps.values for taps in self.taps)
        for path, groups in self.groups.items():
            wanted = full[path].index_select(1, self.left[path]) if path in self.left else full[path]
            yield Pair(own[path].float(), wanted.float(), groups)

    def release(self, model: nn.Module) -> None:
        """Stops watching the model, or a copy of it."""
        self.taps[0].remove(model)
