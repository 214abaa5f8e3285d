"""Finding the BatchNorm behind a quantized layer, and what it does to each channel.

Every quantizer here rounds the *raw* weight (quantize, then normalize), so a BatchNorm at rest is one more factor
and shift per output channel, and folds into the layer's scale and bias without touching an integer:

    y_c = (acc_c s_x s_c + b_c - mu_c) gamma_c / sqrt(var_c + eps) + beta_c
        = acc_c s_x (s_c f_c) + ((b_c - mu_c) f_c + beta_c),        f_c = gamma_c / sqrt(var_c + eps)

What reads what is taken from a recorded forward pass (`galago.layers.flow`), however the model is written.
Background: Jacob et al., CVPR 2018, arXiv 1712.05877, section 3.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.layers import Flow, Wrapper, find, swap

CLIPS = frozenset(("relu", "hardtanh", "clamp", "clamp_min"))


class Scaling(NamedTuple):
    """`x * factor + shift` for each output channel, float64."""

    factor: Tensor
    shift: Tensor

    def after(self, first: Scaling) -> Scaling:
        """Both in one, `first` coming first."""
        return Scaling(self.factor * first.factor, self.factor * first.shift + self.shift)


def scaling_of(norm: nn.Module) -> Scaling:
    """What a BatchNorm does in evaluation mode."""
    assert isinstance(norm, _BatchNorm)  # `is_foldable` made sure
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.detach().double(), norm.running_var.detach().double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    factor = gamma / (variance + norm.eps).sqrt()
    return Scaling(factor, beta - mean * factor)


class FoldedNorm(Wrapper):
    """What is left of a BatchNorm whose factor went into the layer before it: a bias, in training as well.

    Args:
        layer: the BatchNorm, which does not normalize by the batch any more.

    Attributes:
        mean: of each channel that it gives out, as far as its training tells (a normal distribution).
        deviation: the standard deviation, likewise.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        assert isinstance(layer.running_mean, Tensor)
        self.register_buffer("mean", torch.zeros_like(layer.running_mean))
        self.register_buffer("deviation", torch.ones_like(layer.running_mean))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output

    def train(self, mode: bool = True) -> FoldedNorm:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = False
        return self


@torch.no_grad()
def fold_norm(network: nn.Module, path: str, norm_path: str) -> nn.Module:
    """Puts a BatchNorm's factor into the weight of the layer before it, so that a bias is left of it.

    Args:
        network: changed in place; the same, or what stands in its place, comes back.
        path: of the layer, whose weight's first axis is that of its output channels.
        norm_path: of the BatchNorm that alone reads it.
    """
    layer, norm = find(network, path), find(network, norm_path)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor, shift = scaling_of(norm)
    left = find(network, norm_path.rpartition(".")[0])
    if not isinstance(left, FoldedNorm):  # else it was folded before
        left = FoldedNorm(norm)
        left.mean.copy_(torch.zeros(()) if norm.bias is None else norm.bias)
        left.deviation.copy_(torch.ones(()) if norm.weight is None else norm.weight.abs())
        network = swap(network, norm_path, left)
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    if bias is not None:
        shift = shift + bias.double() * factor
        bias.zero_()
    weight.copy_(weight.double() * factor.view(-1, *[1] * (weight.ndim - 1)))
    norm.running_var.fill_(1 - norm.eps)
    if norm.bias is None:  # then it has no weight either
        norm.running_mean.copy_(-shift)
    else:
        norm.running_mean.zero_()
        norm.weight.fill_(1.0)
        norm.bias.copy_(shift)
    return network


def following_norm(network: nn.Module, seen: Flow, path: str) -> str | None:
    """The path of the BatchNorm that alone reads what the layer at `path` gives, each running just once.

    None where there is none, or where folding it would change another reader of the same tensor.
    """
    gave = seen.gave.get(path, [])
    if len(gave) != 1 or len(gave[0]) != 1:
        return None
    number = gave[0][0]
    readers = {call.module for call in seen.consumers(number)}
    if len(readers) != 1 or number in {given for run in seen.gave[""] for given in run}:
        return None
    reader = readers.pop()
    alone = len(seen.received.get(reader, [])) == 1 and number in seen.received[reader][0]
    channels_second = seen.values[number].ndim > 2 or isinstance(find(network, reader), nn.BatchNorm1d)
    return reader if alone and channels_second and is_foldable(find(network, reader)) else None


def ends_of(seen: Flow, layers: Mapping[str, str | None]) -> dict[int, str]:
    """Which layer made a tensor, by the tensor's number: what it gave, or what its folded BatchNorm made of that.

    Args:
        seen: the recorded pass.
        layers: path of each layer to the path of the BatchNorm folded into it, or None.
    """
    ends = {}
    for path, norm in layers.items():
        number = seen.gave[path][0][0]
        ends[seen.consumers(number)[0].outputs[0] if norm is not None else number] = path
    return ends


def layer_before(seen: Flow, number: int, ends: Mapping[int, str]) -> str | None:
    """The layer whose result, at most clipped, a tensor is."""
    while number not in ends:
        call = seen.producer(number)
        if call is None or call.operation not in CLIPS:
            return None
        number = call.inputs[0]
    return ends[number]


def is_foldable(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with fixed statistics that computes what PyTorch's own does."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return False
    own_forward = type(module).forward is not _BatchNorm.forward
    return not own_forward or isinstance(module, nn.SyncBatchNorm) or normalizes_then_activates(module)


def normalizes_then_activates(module: nn.Module) -> bool:
    """Whether it is timm's BatchNormAct: normalization, then drop-out, then an activation."""
    return isinstance(getattr(module, "drop", None), nn.Module) and isinstance(getattr(module, "act", None), nn.Module)


def without_norm(module: nn.Module) -> nn.Module:
    """What is left of a folded BatchNorm."""
    if not normalizes_then_activates(module):
        return nn.Identity()
    parts = {name: part for name, part in module.named_children() if name in ("drop", "act")}
    # under their own names, by which the streams behind them are known
    return nn.Sequential(OrderedDict((name, p) for name, p in parts.items() if not isinstance(p, nn.Identity)))
