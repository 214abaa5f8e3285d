"""What cells may be made of: operations on texts and on images, and what stands before the cells.

Ours, after the search space of DARTS (arXiv:1806.09055). A text is an image of one row (`galago.datasets.texts`), so
that one set of layers serves both: a convolution over a text has a kernel of one row. On images convolutions are
depth-wise separable.

    conv k      ReLU → k (images: depth-wise k × k, then 1 × 1) → BatchNorm        k = 1, 3, 5, 7
    dilated k   the same with every second position                                k = 3, 5
    average, maximum    pooling over 3 positions → BatchNorm
    identity, zero      nothing, no edge

All keep number of channels and size. Padding bytes of a text are zeros where they enter, and no text's features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.errors import UserError


class Operation(Enum):
    """What may stand on an edge; `zero` first, which is no edge."""

    zero = "zero"
    identity = "identity"
    conv_1 = "conv_1"
    conv_3 = "conv_3"
    conv_5 = "conv_5"
    conv_7 = "conv_7"
    dilated_3 = "dilated_3"
    dilated_5 = "dilated_5"
    average = "average"
    maximum = "maximum"


OPERATIONS = tuple(Operation)


class Kernel(NamedTuple):
    """Of a convolution, along a side that it slides over."""

    size: int
    dilation: int = 1


KERNELS = {
    Operation.conv_1: Kernel(1),
    Operation.conv_3: Kernel(3),
    Operation.conv_5: Kernel(5),
    Operation.conv_7: Kernel(7),
    Operation.dilated_3: Kernel(3, 2),
    Operation.dilated_5: Kernel(5, 2),
}


class Space(ABC):
    """Which layers stand for the operations, and what makes features N×C×H×W of an input."""

    @abstractmethod
    def stem(self, width: int, affine: bool) -> nn.Module:
        """From normalized input to features of `width` channels."""

    @abstractmethod
    def convolution(self, width: int, kernel: Kernel) -> list[nn.Module]:
        """Layers that keep number of channels and size."""

    @abstractmethod
    def pooling(self, operation: Operation) -> nn.Module:
        """Over 3 positions, the size kept."""

    @abstractmethod
    def summary(self) -> nn.Module:
        """From features N×C×H×W to one number a channel, N×C×1×1."""

    def layer(self, operation: Operation, width: int, affine: bool) -> nn.Module:
        """What stands for an operation on an edge.

        Args:
            operation: which.
            width: channels in and out.
            affine: whether BatchNorm learns a factor and a shift. Not while the operations compete.
        """
        if operation in (Operation.zero, Operation.identity):
            return Zero() if operation is Operation.zero else nn.Identity()
        norm = nn.BatchNorm2d(width, affine=affine)
        if operation in KERNELS:
            return nn.Sequential(nn.ReLU(), *self.convolution(width, KERNELS[operation]), norm)
        return nn.Sequential(self.pooling(operation), norm)

    def cost(self, operation: Operation, width: int) -> int:
        """Parameters of an operation's convolutions; multiply-accumulates are as many at every position."""
        layer = self.layer(operation, width, affine=False)
        return sum(parameter.numel() for parameter in layer.parameters())


class TextSpace(Space):
    """Cells over texts, N×1×1×T bytes.

    Args:
        dropout: share of the features of a byte that training leaves out.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        self.dropout = dropout

    def stem(self, width: int, affine: bool) -> nn.Module:
        return Bytes(width, self.dropout)

    def convolution(self, width: int, kernel: Kernel) -> list[nn.Module]:
        return [_convolution(width, width, (1, kernel.size), kernel.dilation)]

    def pooling(self, operation: Operation) -> nn.Module:
        return _pooling(operation, (1, 3))

    def summary(self) -> nn.Module:
        """The largest value, wherever in the text it is."""
        return nn.AdaptiveMaxPool2d(1)


class ImageSpace(Space):
    """Cells over images, N×C×H×W.

    Args:
        channels: C.
        stride: of the first convolution; 2 makes the cells cost a quarter.
    """

    def __init__(self, channels: int = 3, stride: int = 1) -> None:
        if stride < 1:
            raise UserError(f"ImageSpace: stride is {stride}; give 1 or more")
        self.channels, self.stride = channels, stride

    def stem(self, width: int, affine: bool) -> nn.Module:
        convolution = nn.Conv2d(self.channels, width, 3, self.stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width, affine=affine))

    def convolution(self, width: int, kernel: Kernel) -> list[nn.Module]:
        across = _convolution(width, width, (1, 1), 1)
        if kernel.size == 1:
            return [across]
        return [_convolution(width, width, (kernel.size, kernel.size), kernel.dilation, groups=width), across]

    def pooling(self, operation: Operation) -> nn.Module:
        return _pooling(operation, (3, 3))

    def summary(self) -> nn.Module:
        return nn.AdaptiveAvgPool2d(1)


class Bytes(nn.Module):
    """An embedding of every byte, N×1×1×T to N×width×1×T; byte 0 is padding and becomes zeros.

    Args:
        width: numbers a byte.
        dropout: share of them that training leaves out.
    """

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(256, width, padding_idx=0)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.dropout(self.embedding(byte_numbers(x)))
        return features.transpose(1, 2).unsqueeze(2)


class Zero(nn.Module):
    """No edge: zeros, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def byte_numbers(x: Tensor) -> Tensor:
    """N×T whole numbers 0 to 255, of normalized texts N×1×1×T, which are floats."""
    return x.flatten(1).round().long().clamp(0, 255)


def _convolution(before: int, width: int, kernel: Sequence[int], dilation: int, groups: int = 1) -> nn.Module:
    size, padding = (kernel[0], kernel[1]), (kernel[0] // 2 * dilation, kernel[1] // 2 * dilation)
    return nn.Conv2d(before, width, size, padding=padding, dilation=dilation, groups=groups, bias=False)


def _pooling(operation: Operation, size: tuple[int, int]) -> nn.Module:
    padding = (size[0] // 2, size[1] // 2)
    if operation is Operation.maximum:
        return nn.MaxPool2d(size, 1, padding)
    return nn.AvgPool2d(size, 1, padding, count_include_pad=False)
