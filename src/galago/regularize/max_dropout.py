"""MaxDropout: the most active units of a layer are dropped, so that the others learn to tell something too.

Claudio Filipi Goncalves dos Santos, Danilo Colombo, Mateus Roder, João Paulo Papa, "MaxDropout: Deep Neural Network
Regularization Based on Maximum Output Values", ICPR 2020, arXiv:2007.13723.

While training, whatever lies in the upper part of a tensor's range of values is set to zero, without any draw and
without scaling up the rest.

    u = (x - min x) / (max x - min x),   y = 0 where u > 1 - d, x elsewhere

d is a share of the range, not of the units: behind a ReLU far fewer than d of them are dropped.

When: in dropout's place in residual networks, alone or with `galago.augment.cutmix`. It costs two passes over each map
that it acts on; the finished network has nothing of it.

Usual setting (official code): d = 0.3 behind each stage of a ResNet-18, between the two convolutions of each block of a
Wide-ResNet; SGD with Nesterov's momentum at 0.1, ×0.2 at epochs 60, 120 and 160 of 200, batch 128, decay 5e-4.
Recipe: recipes/regularize/max_dropout_resnet20_cifar10.yaml.

Checked against the official layer; where that would go on dropping in prediction (it is made anew in each forward
pass), this one does not. Chosen here: it acts on what a layer gives out, in front of a quantizer of that. Where all
values are equal nothing is dropped. Minimum and maximum are taken in float32, of the whole tensor as in the paper, so
that an image's units depend on its batch and on how many processes share it; `per_image` and `per_channel` are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import innermost, must_match
from galago.method import Method


def drop_maxima(x: Tensor, rate: float, per_image: bool = False, per_channel: bool = False) -> Tensor:
    """The tensor with its largest values at zero; of any shape N×C×….

    Args:
        x: what a layer gave out.
        rate: d, the share of the range of values that is dropped.
        per_image: each image has its own minimum and maximum.
        per_channel: each channel has.

    >>> drop_maxima(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 0.3)
    tensor([0., 1., 2., 0., 0.])
    """
    whole = [axis for axis in range(x.ndim) if not (axis == 0 and per_image) and not (axis == 1 and per_channel)]
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.amin(whole, keepdim=True), wide.amax(whole, keepdim=True)
    spread = high - low
    u = (wide - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(u > 1 - rate, 0.0, x)


class MaxDropout(Method):
    """Drops the most active units of some layers' outputs while training.

    Args:
        rate: d, the share of each range of values that is dropped; 0 drops nothing, 1 all but the smallest.
        layers: patterns of paths or type names of the layers whose output is meant; the stages of a ResNet.
        per_image: a range for each image instead of one for the batch.
        per_channel: a range for each channel instead of one for all.
    """

    def __init__(
        self,
        rate: float = 0.3,
        layers: Sequence[str] = ("layer[0-9]",),
        per_image: bool = False,
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise UserError(f"MaxDropout: rate is {rate:g}; give a share from 0 to 1, usually 0.3")
        if not layers:
            raise UserError("MaxDropout: layers is empty; name at least one, such as layer3")
        self.rate, self.layers = rate, list(layers)
        self.per_image, self.per_channel = per_image, per_channel
        self._told: list[str] = []

        def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not module.training:
                return output
            if not isinstance(output, Tensor):
                raise UserError(f"MaxDropout: a {type(module).__name__} gives no single tensor; name other layers")
            return drop_maxima(output, self.rate, self.per_image, self.per_channel)

        self._hook = drop

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Puts hooks on the layers, which stay until training ends.

        Raises:
            UserError: a pattern matches nothing.
        """
        modules = dict(model.named_modules())
        for pattern in self.layers:
            must_match(pattern, modules)
        found = {id(innermost(module)): path for path, module in modules.items() if path and self._means(path, module)}
        for path in found.values():
            innermost(modules[path]).register_forward_hook(self._hook)
        self._told = list(found.values())
        return model

    def _means(self, path: str, module: nn.Module) -> bool:
        names = (path, type(innermost(module)).__name__)
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.layers)

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hooks away."""
        for module in model.modules():
            for number, hook in list(module._forward_hooks.items()):
                if hook is self._hook:
                    del module._forward_hooks[number]
        return model

    def summary(self) -> str:
        """Which layers it acts on."""
        return f"MaxDropout: {self.rate:g} of the range behind {', '.join(self._told)}"
