"""Stochastic depth: residual branches are left out at random, so that each step trains a shallower network.

Gao Huang, Yu Sun, Zhuang Liu, Daniel Sedra, Kilian Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016,
arXiv:1603.09382 (recalled).

In training each residual branch is there or not, the deeper ones less often; the finished network has all of them, each
as strong as it was on average.

    b_l ~ Bernoulli(p_l),  p_l = 1 - (l / L) (1 - p_L),  l = 1 … L
    training   x + b_l F_l(x)
    evaluation x + p_l F_l(x)

When: deep residual networks trained from scratch; also as the milder neighbor of
`galago.regularize.shake_drop`. When training ends p_l goes into the weights of the branch's last layer, and nothing is
left of it. List it behind `Quantize`, if there is one.

Usual setting: p_L = 0.5, for networks of 110 layers; for shallow ones 0.8 to 0.9. Recipe:
recipes/regularize/stochastic_depth_resnet20_cifar10.yaml.

Chosen here: a branch that is left out is computed all the same and multiplied by 0, so that a step takes as long as
any other and BatchNorm's statistics see every batch; the paper skips it and saves a quarter of the time. `per_image`
draws for each image (today's usual form, as in torchvision's `row`), the default, as in the paper, for each batch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.quantize.wrapping import quantized, require_quantizers_first
from galago.regularize.residual import Branch, fold_survival, said, scale_branches


def gates(y: Tensor, survival: float, per_image: bool) -> Tensor:
    """`b`, 0 or 1: one number, or N×1×… for each image.

    >>> gates(torch.ones(3, 2, 4, 4), 1.0, per_image=True).shape
    torch.Size([3, 1, 1, 1])
    """
    shape = (len(y), *[1] * (y.ndim - 1)) if per_image else ()
    return (torch.rand(shape, device=y.device) < survival).to(y.dtype)


class DroppedBranch(Branch):
    """The last layer of a residual branch, whose result is left out at random in training.

    Args:
        layer: gives N×….
        survival: p_l.
        per_image: decide for each image.
    """

    def __init__(self, layer: nn.Module, survival: float, per_image: bool = False) -> None:
        super().__init__(layer, survival)
        self.per_image = per_image

    def perturbed(self, y: Tensor) -> Tensor:
        return y * gates(y, self.survival, self.per_image)


class StochasticDepth(Method):
    """Leaves residual branches out at random; list it behind `Quantize`.

    Args:
        last_survival: p_L, how likely the last branch is there; the first ones nearly always are.
        per_image: decide for each image instead of for each batch.
    """

    def __init__(self, last_survival: float = 0.5, per_image: bool = False) -> None:
        super().__init__()
        if not 0 <= last_survival <= 1:
            raise UserError(f"StochasticDepth: last_survival is {last_survival:g}; give a probability, usually 0.5")
        self.last_survival, self.per_image = last_survival, per_image
        self._said, self._quantized = "", False

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Wraps the last layer of each residual branch.

        Raises:
            UserError: there is none.
        """
        self._quantized = bool(quantized(model))
        model = scale_branches(model, data, partial(DroppedBranch, per_image=self.per_image), self.last_survival)
        self._said = said(model)
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        require_quantizers_first(model, self._quantized, "StochasticDepth")
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Puts p_l into the weights and takes the wrappers away."""
        require_quantizers_first(model, self._quantized, "StochasticDepth")
        return fold_survival(model)

    def summary(self) -> str | None:
        """Which branches are there with which probability."""
        return f"StochasticDepth: branches are there with probability {self._said}" if self._said else None
