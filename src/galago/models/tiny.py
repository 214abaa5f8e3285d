"""A tiny network for tiny grey images: handwritten digits of 8×8 to 28×28 pixels, trained in seconds on a laptop.

Ours; a residual network cut down to what a demonstration and a test need. Three steps: a 3×3 convolution, a residual
block of two 3×3 convolutions at full size, a 3×3 convolution that halves the image and doubles the channels; then
global average pooling and a linear layer. Every convolution is followed by BatchNorm and ReLU, so each construct that
matters to quantization and export occurs once: a stem, a residual sum, a stride, a head.

When to use it: demonstrations, tests, a teacher (`width` 64) and its student (`width` 24). With w channels it has
about 36·w² parameters: 9,850 at width 16, 149,962 at width 64.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from galago.models.weights import load_weights


class Tiny(nn.Module):
    """Small residual network, N×C×H×W to class scores N×K.

    Args:
        classes: number of outputs.
        channels: of the input image.
        width: channels of the first half; the second has twice as many.
    """

    def __init__(self, classes: int = 10, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.classes, self.channels, self.width = classes, channels, width
        self.stem = _convolution(channels, width)
        self.block = Residual(width)
        self.down = _convolution(width, 2 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.flatten(self.pool(self.down(self.block(self.stem(x))))))
        return scores


class Residual(nn.Module):
    """Two 3×3 convolutions with a sum around them.

    Args:
        width: channels in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first = _convolution(width, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.relu(self.bn(self.conv(self.first(x))) + x)
        return output


def _convolution(before: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def tiny(classes: int = 10, channels: int = 1, width: int = 16, weights: Path | None = None) -> nn.Module:
    """A tiny residual network for images of 8×8 to 28×28 pixels.

    Args:
        classes: number of outputs.
        channels: of the input image.
        width: channels of the first half; a teacher may be wider than its student.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(Tiny(classes, channels, width), weights)
