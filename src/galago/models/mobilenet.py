"""MobileNetV2 for small images: inverted residuals with depthwise convolutions, for 32 to 64 pixels.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv 1801.04381.

A block widens its input t times by a 1×1 convolution, filters each channel by a 3×3 depthwise convolution and narrows
again by a 1×1 convolution without an activation after it; input and output are added where their shapes agree.
Activations are ReLU6, min(max(x, 0), 6), which bounds the range that a quantizer has to cover.

When to use it: small and fast on phones and processors, harder to quantize than a ResNet (depthwise weights differ
much in range from channel to channel: quantize per channel). At width 1 and 10 classes it has 2,236,682 parameters and
87,976,448 multiply-accumulates at 32×32.

Chosen for small images (the paper's table is for 224 pixels): the stem and the second stage keep the resolution, so the
last feature map of a 32-pixel image is 4×4. Channel counts are rounded to multiples of 8, never down by more than a
tenth; the last convolution has 1280 channels, more for widths above 1.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from galago.errors import UserError
from galago.models.weights import load_weights

# widening t, channels c, blocks n, stride s of the first block: table 2 of the paper, with one stride taken out
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(nn.Module):
    """Inverted residual network for small images, N×C×H×W to class scores N×K.

    Args:
        classes: number of outputs.
        channels: of the input image.
        width: multiplies the channels of every layer.
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        if width <= 0:
            raise UserError(f"MobileNetV2: width is {width}; give a positive factor such as 0.5 or 1.0")
        self.classes, self.channels, self.width = classes, channels, width
        before, last = divisible(32 * width), divisible(1280 * max(1.0, width))
        self.stem = _convolution(channels, before, 3)
        blocks: list[nn.Module] = []
        for widening, plain, count, stride in _STAGES:
            after = divisible(plain * width)
            for number in range(count):
                blocks.append(InvertedResidual(before, after, stride if number == 0 else 1, widening))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.last = _convolution(before, last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(last, classes)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.flatten(self.pool(self.last(self.blocks(self.stem(x))))))
        return scores


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; add the input where the shape allows it.

    Args:
        before: channels that come in.
        after: channels that go out.
        stride: of the depthwise convolution.
        widening: how many times more channels there are inside.
    """

    def __init__(self, before: int, after: int, stride: int, widening: int) -> None:
        super().__init__()
        self.before, self.after, self.stride, self.widening = before, after, stride, widening
        inside = before * widening
        self.widen = nn.Identity() if widening == 1 else _convolution(before, inside, 1)
        self.filter = _convolution(inside, inside, 3, stride, groups=inside)
        self.narrow = nn.Sequential(nn.Conv2d(inside, after, 1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.narrow(self.filter(self.widen(x)))
        return x + output if self.stride == 1 and self.before == self.after else output


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by`, at least `by`, and never less than nine tenths of `channels`.

    >>> divisible(12), divisible(16.8), divisible(11.9), divisible(3)
    (16, 16, 16, 8)
    """
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def _convolution(before: int, after: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU6())


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)


def mobilenet_v2(classes: int = 10, channels: int = 3, width: float = 1.0, weights: Path | None = None) -> nn.Module:
    """MobileNetV2 for images of 32 to 64 pixels.

    Args:
        classes: number of outputs.
        channels: of the input image.
        width: multiplies the channels of every layer.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(MobileNetV2(classes, channels, width), weights)
