"""Dropout: leave out a share of what the classifier reads, anew for each image, so that it relies on no single number.

Nitish Srivastava, Geoffrey Hinton, Alex Krizhevsky, Ilya Sutskever, Ruslan Salakhutdinov, "Dropout: A Simple Way to
Prevent Neural Networks from Overfitting", Journal of Machine Learning Research 15, 2014; first in Hinton et al.,
"Improving neural networks by preventing co-adaptation of feature detectors", arXiv:1207.0580.

    m_i ~ Bernoulli(1 - p),   z = W (m ⊙ x) / (1 - p) + b        in training; z = W x + b when the network predicts

When: little data, or a wide last layer. It costs nothing in use and little in training. Small networks on much data
learn less with it. It stays in the network, where it rests and no file holds it, so that
`galago.probes.monte_carlo_dropout` can ask the network several times.

Usual setting: p = 0.5 in fully connected layers (paper); 0.2 to 0.3 before the classifier of a convolutional network.
Recipe: recipes/regularize/dropout_resnet20_cifar10.yaml.

Chosen here: it goes in front of the last linear layer, or of the layers named; p = 0.2 by default. Behind `Quantize` it
drops before the layer's input is rounded. It draws from the device's own generator, as PyTorch's layer does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import Wrapper, classifier, find, swap
from galago.method import Method


class DropoutBefore(Wrapper):
    """A layer that sees what dropout leaves of its input.

    Args:
        layer: takes one tensor.
        rate: share that is left out in training.
    """

    def __init__(self, layer: nn.Module, rate: float) -> None:
        super().__init__(layer)
        self.rate, self.dropout = rate, nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(self.dropout(x))
        return output


class Dropout(Method):
    """Puts dropout in front of layers.

    Args:
        rate: p, the share that is left out.
        layers: paths of the layers in front of which it goes; none for the last linear layer alone.
    """

    def __init__(self, rate: float = 0.2, layers: Sequence[str] = ()) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise UserError(f"Dropout: rate is {rate:g}; give a share from 0 to below 1, usually 0.2 to 0.5")
        self.rate, self.layers = rate, list(layers)
        self._places: list[str] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Wraps the layers.

        Raises:
            UserError: there is no such layer, or no linear one.
        """
        self._places = self.layers or [classifier(model)]
        for place in self._places:
            model = swap(model, place, DropoutBefore(find(model, place), self.rate))
        return model

    def summary(self) -> str | None:
        """In front of which layers it drops."""
        return f"Dropout: {self.rate:g} in front of {', '.join(self._places)}" if self._places else None
