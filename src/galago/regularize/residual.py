"""Residual branches: where a network adds one to its shortcut, and a wrapper that scales it until training is over.

The network runs once on an image and what feeds what is read off (`galago.layers.flow`), however it is written. Where
two results of the image are added, the one with more weight layers of its own behind it is the branch, the other the
shortcut: an identity has none, a projection one. The last layer of a branch is wrapped. `shake_drop` and
`stochastic_depth` say by what the wrapper multiplies.

    survival of branch l of L:   p_l = 1 - (l / L) (1 - p_L)          training x + c_l F_l(x), E c_l = p_l
    evaluation                   x + p_l F_l(x)
    after training               weight and bias of the last layer of F_l times p_l, nothing else is left

Chosen here: l counts branches in the order of execution. A last layer has to be linear in its weight and bias
(BatchNorm, convolution, linear layer, LayerNorm, GroupNorm), or p_l could not go into them. The wrapper stands inside
the quantizer of what the layer gives out, so quantizers come first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from galago.data import Data
from galago.errors import UserError
from galago.layers import Call, Flow, Wrapper, find, flow, innermost
from galago.probe import device_of, evaluating, normalized
from galago.quantize.fold import normalizes_then_activates
from galago.quantize.layer import QuantLayer
from galago.quantize.wrapping import Place, depth, set_ranges_again, unwrapped, wrap

LINEAR_IN_WEIGHTS = (_BatchNorm, _ConvNd, nn.Linear, nn.LayerNorm, nn.GroupNorm)
PRODUCTS = frozenset(("convolution", "addmm", "mm", "bmm", "baddbmm", "linear"))  # what weight layers compute


def survival(count: int, last: float) -> list[float]:
    """p_1 … p_L, falling in a straight line.

    >>> survival(4, 0.5)
    [0.875, 0.75, 0.625, 0.5]

    Args:
        count: L, how many branches.
        last: p_L.
    """
    return [1 - number / count * (1 - last) for number in range(1, count + 1)]


class Branch(Wrapper, ABC):
    """The last layer of a residual branch: what it gives is multiplied by a random number, or by its expectation.

    Args:
        layer: gives N×….
        survival: p_l, the expectation.
    """

    def __init__(self, layer: nn.Module, survival: float) -> None:
        super().__init__(layer)
        self.survival = survival

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y: Tensor = self.layer(*args, **kwargs)
        return self.perturbed(y) if self.training else y * self.survival

    @abstractmethod
    def perturbed(self, y: Tensor) -> Tensor:
        """What comes out in training, of the shape of y."""


class Residuals(NamedTuple):
    """The residual sums of a network."""

    branches: list[str]  # path of each one's last layer, in the order of execution
    others: dict[str, str]  # where a branch cannot be scaled, and why


def residuals(model: nn.Module, image: Tensor) -> Residuals:
    """Where a network adds a branch to its shortcut.

    Args:
        model: in any mode, quantized or not.
        image: normalized, 1×C×H×W.

    >>> from galago.models.tiny import Tiny
    >>> residuals(Tiny(), torch.zeros(1, 1, 8, 8))
    Residuals(branches=['block.bn'], others={})
    """
    device = [image.device] if image.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(device):
        seen = flow(model, image)
    found = Residuals([], {})
    for call, branch in _sums(seen, seen.received[""][0]):
        path, why = _last_layer(model, seen, call, branch)
        if why:
            found.others[call.module or "the network itself"] = why
        else:
            found.branches.append(path)
    return found


def _sums(seen: Flow, given: tuple[int, ...]) -> list[tuple[Call, int]]:
    """Every addition of two results of the input, with the one that more weight layers of its own lead to."""
    behind: dict[int, frozenset[int]] = {number: frozenset() for number in given}
    found = []
    for place, call in enumerate(seen.calls):
        known = [behind[number] for number in call.inputs if number in behind]
        if not known:
            continue  # made of weights alone
        if call.operation == "add" and len(known) == len(call.inputs) == 2:
            own = [len(known[0] - known[1]), len(known[1] - known[0])]
            if own[0] != own[1]:
                found.append((call, call.inputs[own.index(max(own))]))
        layers = frozenset().union(*known, [place] if call.operation in PRODUCTS else [])
        behind.update(dict.fromkeys(call.outputs, layers))
    return found


def _last_layer(model: nn.Module, seen: Flow, call: Call, branch: int) -> tuple[str, str]:
    """The path of the layer that gives a branch's result, or why it cannot be scaled."""
    if len(seen.consumers(branch)) > 1:
        return "", "more than the sum reads what its branch gives"
    paths = [path for path, runs in seen.gave.items() if path and runs == [(branch,)]]
    ends = [path for path in paths if isinstance(innermost(find(model, path)), LINEAR_IN_WEIGHTS)]
    if not ends:
        return "", "its branch does not end in a layer with a weight"
    path = min(ends, key=depth)
    return path, _obstacle(find(model, path))


def _obstacle(end: nn.Module) -> str:
    """Why a factor cannot go into a layer's weight and bias; empty if it can."""
    layer = innermost(end)
    if layer.weight is None:
        return f"the {type(layer).__name__} at the end of its branch has no weight"
    if any(isinstance(part, QuantLayer) for part in end.modules()):
        return "the layer at the end of its branch has a quantized weight"
    if normalizes_then_activates(layer) and not isinstance(layer.act, nn.Identity):
        return "its branch ends in an activation"
    return ""


def scale_branches(model: nn.Module, data: Data, make: Callable[[nn.Module, float], Branch], last: float) -> nn.Module:
    """The network with its branches wrapped, and ranges that were set without that set again.

    Args:
        model: changed in place.
        data: gives an example.
        make: gives the wrapper around a layer, of survival p_l.
        last: p_L.

    Raises:
        UserError: there is no residual branch that can be scaled.
    """
    found = residuals(model, normalized(data, data.example(), device_of(model)))
    if not found.branches:
        why = "; ".join(f"{where}: {reason}" for where, reason in found.others.items()) or "it adds none to a shortcut"
        raise UserError(f"{type(model).__name__} has no residual branch that can be dropped ({why}); leave it out")
    odds = dict(zip(found.branches, survival(len(found.branches), last), strict=True))
    chosen = [Place(path, (path,), innermost(find(model, path))) for path in found.branches]
    model = wrap(model, chosen, lambda place, layer: make(layer, odds[place.name]))
    set_ranges_again(model, data)
    return model


@torch.no_grad()
def fold_survival(model: nn.Module) -> nn.Module:
    """The network as it is in evaluation mode without the wrappers: p_l goes into weights and biases."""
    for branch in [module for module in model.modules() if isinstance(module, Branch)]:
        for layer in branch.layer.modules():
            if isinstance(layer, LINEAR_IN_WEIGHTS):
                for parameter in layer.parameters(recurse=False):
                    parameter.mul_(branch.survival)
    return unwrapped(model, Branch)


def said(model: nn.Module) -> str:
    """Which branches are scaled, for a person to read."""
    branches: list[tuple[str, Any]] = [(path, part) for path, part in model.named_modules() if isinstance(part, Branch)]
    return ", ".join(f"{path} {branch.survival:.3g}" for path, branch in branches)
