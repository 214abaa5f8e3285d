"""A layer as a matrix: its weight as rows and columns, and the inputs that the columns are multiplied with.

Convolutions of all kinds and linear layers are the same then, a matrix for each group of channels. A row is an output
channel; a column an input channel and, in a convolution, a tap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def groups_in(layer: nn.Module) -> int:
    """Into how many parts a layer's channels fall that have nothing to do with each other."""
    return int(getattr(layer, "groups", 1))


def transposed(layer: nn.Module) -> bool:
    """Whether a weight's first axis is the layer's input."""
    return isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


def rows_and_columns(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or a tensor of its shape, as G×R×C: groups, output channels, input channels and taps."""
    groups = groups_in(layer)
    if not transposed(layer):
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])  # group, input, output, taps
    return parts.transpose(1, 2).flatten(3).flatten(2)


def as_weight(layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The way back from `rows_and_columns`."""
    if not transposed(layer):
        return matrix.reshape(shape)
    groups = groups_in(layer)
    return matrix.reshape(groups, shape[1], shape[0] // groups, *shape[2:]).transpose(1, 2).reshape(shape)


def unfolding(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What gives, from a layer's input, the columns that its weight's rows are multiplied with: G×C×samples.

    A convolution of the same kind whose weights are 1 at one tap and 0 at all others does it, with whatever stride,
    padding and dilation the layer has, in one, two or three dimensions, transposed or not.
    """
    if isinstance(layer, nn.Linear):
        return lambda x: x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    kind: Any = layer
    weight, channels, taps = layer.get_parameter("weight"), kind.in_channels, math.prod(kind.kernel_size)
    own = {"output_padding": kind.output_padding} if transposed(layer) else {"padding_mode": kind.padding_mode}
    with torch.device(weight.device):
        unfold = type(kind)(
            channels,
            channels * taps,
            kind.kernel_size,
            stride=kind.stride,
            padding=kind.padding,
            dilation=kind.dilation,
            groups=channels,
            bias=False,
            **own,
        ).to(weight.dtype)
    picks = torch.eye(taps, dtype=weight.dtype, device=weight.device).view(taps, *kind.kernel_size)
    shaped = picks.expand(channels, taps, *kind.kernel_size)
    unfold.weight.data = shaped.clone() if transposed(layer) else shaped.reshape(-1, 1, *kind.kernel_size)

    def columns(x: Tensor) -> Tensor:
        taken: Tensor = unfold(x).flatten(2)  # images, channels and taps, places
        groups = groups_in(layer)
        return taken.reshape(len(x), groups, -1, taken.shape[-1]).permute(1, 2, 0, 3).flatten(2)

    return columns
