"""What the methods on a layer's norm have in common: its weight, and the matrix that it is for the images it sees.

A network may be another one in the middle of a training (pruned, grown, branched), so its layers are looked for again
whenever they or their shapes have changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.norms import Operator, has_operator, operators
from galago.probe import device_of, normalized


class Placed(NamedTuple):
    """A convolution or linear layer in its network."""

    path: str
    layer: nn.Module
    operator: Operator  # on the layer's device


class Layers:
    """The convolutions and linear layers of a network that run when it predicts.

    Args:
        model: the network.
        data: gives an image of the size that it runs on.
        whose: the method, for messages.

    Raises:
        UserError: there is none.
    """

    def __init__(self, model: nn.Module, data: Data, whose: str) -> None:
        self.image = normalized(data, data.example()[:1], device_of(model))
        self._seen: list[tuple[str, int, torch.Size]] = []
        self._placed: list[Placed] = []
        if not self.of(model):
            raise UserError(f"{whose} finds no convolution or linear layer that it could measure; leave it out")

    def of(self, model: nn.Module) -> list[Placed]:
        """Where they are now, in the order of execution."""
        seen = [
            (path, id(layer), layer.get_parameter("weight").shape)
            for path, layer in model.named_modules()
            if has_operator(layer)
        ]
        if seen != self._seen:
            found = operators(model, self.image.to(device_of(model)))
            self._placed = [placed(model, path, operator) for path, operator in found.items()]
            self._seen = seen
        return self._placed


def placed(model: nn.Module, path: str, operator: Operator) -> Placed:
    """A layer with the matrix that it is, on its own device."""
    layer = model.get_submodule(path)
    return Placed(path, layer, operator.to(layer.get_parameter("weight")))


def weight_of(placed: Placed) -> Tensor:
    """The layer's weight, without its gradient's history; changing it in place changes the layer."""
    return placed.layer.get_parameter("weight").detach()
