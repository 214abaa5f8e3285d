"""Norm loss: every filter is drawn to length 1, instead of to 0 as weight decay does.

Theodoros Georgiou, Sebastian Schmitt, Thomas Bäck, Wei Chen, Michael Lew, "Norm Loss: An Efficient yet Effective
Regularization Method for Deep Neural Networks", ICPR 2020, arXiv:2103.06583.

The weights of each output channel are one vector. Longer than 1 it decays, shorter than 1 it grows, and its direction
is left to the task.

    L = λ Σ_layers Σ_o (1 - ‖w_o‖)²,   its gradient   2 λ (1 - 1 / ‖w_o‖) w_o

When: instead of weight decay, where that takes trouble to tune; the paper reports less dependence on its strength and
on the batch size. It costs a pass over the weights in each step and nothing later.

Usual setting (recalled, the paper's tables could not be had): λ = 0.01; Wide-ResNet on CIFAR for 200 epochs, SGD with
Nesterov's momentum at 0.1, ×0.2 at epochs 60, 120 and 160, batch 128, decay 5e-4 on all other weights.
Recipe: recipes/regularize/norm_loss_resnet20_cifar10.yaml.

Chosen here: the gradient is edited behind clipping and accumulation, which is the same as the loss for every optimizer
that decays nothing by itself; Adam adapts to it as it would to the loss. Weights that it acts on, and biases beside
them, do not decay. A filter that is all zeros (pruned) stays so, without a gradient from here. `hard` does instead what
the loss leads to: after each step every filter is divided by its length. With the head's rows at length 1 scores are
bounded by the features' lengths; `include_head: false` leaves it to weight decay. Quantized layers are drawn by their
float weights. Layers that compute with another weight than they store are left alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import classifier, find, innermost
from galago.method import Method
from galago.norms import LAYERS, TRANSPOSED
from galago.quantize.quantizer import OwnRates

SHORTEST = 1e-12  # what shorter filters count as, apart from those of all zeros


def lengths(filters: Tensor) -> Tensor:
    """`‖w_o‖` of each row of G×O×…, G×O×1.

    >>> lengths(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).flatten().tolist()
    [5.0, 0.0]
    """
    norm: Tensor = torch.linalg.vector_norm(filters.flatten(2), dim=2, keepdim=True)
    return norm


def norm_loss(filters: Tensor) -> Tensor:
    """`Σ_o (1 - ‖w_o‖)²` of the rows of G×O×… that are not all zeros, a scalar.

    >>> norm_loss(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))
    tensor(16.)
    """
    norm = lengths(filters)
    return torch.where(norm > 0, (1 - norm).square(), 0.0).sum()


def pull(filters: Tensor) -> Tensor:
    """The gradient of `norm_loss`, `2 (1 - 1 / ‖w_o‖) w_o`, of the shape G×O×…; 0 for rows of zeros.

    >>> pull(torch.tensor([[[2.0], [0.5]]])).flatten().tolist()
    [2.0, -1.0]
    """
    factor = 2 * (1 - lengths(filters).clamp_min(SHORTEST).reciprocal())
    return (filters.flatten(2) * factor).view_as(filters)


def projected(filters: Tensor) -> Tensor:
    """Every row of G×O×… at length 1; rows of zeros stay.

    >>> projected(torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])).tolist()
    [[[0.0, 1.0], [0.0, 0.0]]]
    """
    return (filters.flatten(2) / lengths(filters).clamp_min(SHORTEST)).view_as(filters)


def by_filter(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A layer's weight, or its gradient, with a row for each output channel, G×O×…: a view where the layout allows.

    >>> by_filter(nn.ConvTranspose2d(4, 6, 2, groups=2), torch.zeros(4, 3, 2, 2)).shape
    torch.Size([2, 3, 2, 2, 2])
    """
    if not isinstance(layer, TRANSPOSED):
        return tensor.unsqueeze(0)
    return tensor.reshape(layer.groups, -1, *tensor.shape[1:]).transpose(1, 2)


def as_weight(layer: nn.Module, filters: Tensor) -> Tensor:
    """What `by_filter` made of a weight, in the weight's shape again."""
    return filters.transpose(1, 2).flatten(0, 1) if isinstance(layer, TRANSPOSED) else filters.squeeze(0)


class _Filters(Method):
    """What both methods on filters have in common: which layers they act on, and that these do not decay.

    Args:
        include_head: whether the classifier's rows count.
    """

    def __init__(self, include_head: bool) -> None:
        super().__init__()
        self.include_head = include_head
        self._head: tuple[nn.Module, ...] = ()  # a tuple, so that it is no part of this module

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing in the model but that the weights acted on do not decay.

        Raises:
            UserError: there are none.
        """
        if not self.include_head:
            self._head = (innermost(find(model, classifier(model))),)
        if not (layers := self.layers(model)):
            raise UserError(f"{type(self).__name__} finds no convolution or linear layer to act on; leave it out")
        for layer in layers:
            layer.__dict__["own_rates"] = without_decay
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if layer.__dict__.get("own_rates") is without_decay:
                del layer.__dict__["own_rates"]
        return model

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers acted on, where they are now."""
        trained = [layer for layer in model.modules() if type(layer) in LAYERS and layer not in self._head]
        return [layer for layer in trained if layer.get_parameter("weight").requires_grad]


class NormLoss(_Filters):
    """Draws every filter of convolutions and linear layers to length 1.

    Args:
        weight: λ.
        include_head: whether the classifier's rows are drawn as well.
    """

    def __init__(self, weight: float = 0.01, include_head: bool = True) -> None:
        super().__init__(include_head)
        if weight < 0:
            raise UserError(f"NormLoss: weight is {weight:g}; give 0 or more, usually 0.01")
        self.weight = weight

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """Edits gradients in front of the optimizer's step."""
        for layer in self.layers(model):
            draw(layer, self.weight)
        apply()


class UnitNorm(_Filters):
    """Divides every filter of convolutions and linear layers by its length, behind every step.

    Args:
        include_head: whether the classifier's rows are divided as well.
    """

    def __init__(self, include_head: bool = True) -> None:
        super().__init__(include_head)

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        """Divides behind the optimizer's step."""
        apply()
        for layer in self.layers(model):
            put_to_one(layer)


def without_decay() -> OwnRates:
    """Of a layer whose filters have a length of their own: as fast as all else, without weight decay."""
    return OwnRates(weight_decay=0.0)


@torch.no_grad()
def draw(layer: nn.Module, weight: float) -> None:
    """Adds λ times the pull to the gradient of a layer's weight, where it has one."""
    stored = layer.get_parameter("weight")
    if stored.grad is not None:
        stored.grad.add_(as_weight(layer, pull(by_filter(layer, stored))), alpha=weight)


@torch.no_grad()
def put_to_one(layer: nn.Module) -> None:
    """Divides every filter of a layer by its length."""
    stored = layer.get_parameter("weight")
    stored.copy_(as_weight(layer, projected(by_filter(layer, stored))))
