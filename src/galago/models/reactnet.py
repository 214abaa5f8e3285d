"""ReActNet: networks made for signs, with a real-valued shortcut around every binary convolution.

Liu, Shen, Savvides and Cheng, "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions",
ECCV 2020, arXiv:2003.03488.

A convolution of signs tells little, so its result is added to what came in, and the sum stays real. The activation
behind it, RPReLU, can move each channel before and after it bends it, which decides where the next signs fall:

    y = BatchNorm(conv(x)) + shortcut(x);    RPReLU(y) = PReLU_c(y + p_c) + q_c,  slope 0.25, p and q 0 at the start

These are the float networks; `Quantize` with `RSign` and `BinaryWeight` (`galago.quantize.reactnet`) makes them binary.

`reactnet_a`: MobileNetV1 with full 3×3 and 1×1 convolutions, each with a shortcut of its own; where a 1×1 convolution
doubles the channels its shortcut is there twice. `reactnet18`: ResNet-18 with a shortcut around each 3×3 convolution;
where a stage halves the image the shortcut is a mean over 2×2 pixels and a 1×1 convolution, which stays float. Both are
for 224 pixels. `reactnet20`: the same with ResNet-20's three stages of 16, 32 and 64 channels, for 32 pixels.

When to use it: for 1 bit. Ordinary networks lose far more (paper, ResNet-18 on ImageNet: XNOR-Net 51.2 %, ReActNet-18
65.9 %). At 1000 classes `reactnet_a` has 28,253,184 weights in binary layers and 1,024,864 in its first and last, and
does 4,816,896,000 binary operations an image.

Recipe: recipes/quantize/reactnet_w1a1_cifar10.yaml.

Design choices: `reactnet20` is a small variant of our own. The two halves of a doubling 1×1 convolution with their
BatchNorms are one convolution with one BatchNorm, which is the same network: they read the same signs, and scales are
per output channel. Thresholds are no part of the network but of the layers' input quantizers. Shifts and slopes do not
decay. Weights start as PyTorch draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.models.weights import load_weights
from galago.quantize.quantizer import OwnRates


class RPReLU(nn.Module):
    """PReLU with a learned shift before and after it, all three per channel.

    Args:
        channels: of what comes in, N×C×H×W.

    >>> RPReLU(1)(torch.tensor([-4.0, 2.0]).view(1, 1, 1, 2)).flatten().tolist()
    [-1.0, 2.0]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.before = nn.Parameter(torch.zeros(channels, 1, 1))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.after = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.prelu(x + self.before, self.slope) + self.after

    def own_rates(self) -> OwnRates:
        """No decay: it would pull shifts and slopes to values that mean nothing."""
        return OwnRates(weight_decay=0.0)


class SignBlock(nn.Module):
    """A 3×3 convolution with a shortcut around it.

    Args:
        before: channels that come in.
        width: channels that go out.
        stride: of the convolution, 1 or 2.
    """

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.before, self.width, self.stride = before, width, stride
        self.conv = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(before, width, stride)
        self.act = RPReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.act(self.bn(self.conv(x)) + self.shortcut(x))
        return output


class PairBlock(nn.Module):
    """A 3×3 and a 1×1 convolution, each with a shortcut around it.

    Args:
        before: channels that come in.
        width: channels that go out: as many, or a multiple.
        stride: of the first convolution, 1 or 2.
    """

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        if width % before:
            raise UserError(f"PairBlock: width is {width}; give a multiple of the {before} channels that come in")
        self.before, self.width, self.stride = before, width, stride
        self.conv1 = nn.Conv2d(before, before, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.shortcut = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.act1 = RPReLU(before)
        self.conv2 = nn.Conv2d(before, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = RPReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)) + self.shortcut(x))
        copies = self.width // self.before
        around = x if copies == 1 else torch.cat([x] * copies, 1)
        output: Tensor = self.act2(self.bn2(self.conv2(x)) + around)
        return output


class ReActNet(nn.Module):
    """ResNet with a shortcut around every 3×3 convolution, N×C×H×W to class scores N×K.

    Args:
        blocks: how many blocks, of one convolution each, every stage has.
        widths: channels of each stage; every stage but the first halves the image.
        classes: number of outputs.
        channels: of the input image.
        small: images of 32 to 64 pixels: a 3×3 stem and no pooling behind it.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], classes: int = 10, channels: int = 3, small: bool = True
    ) -> None:
        super().__init__()
        self.blocks, self.widths = list(blocks), list(widths)
        self.classes, self.channels, self.small = classes, channels, small
        size, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(channels, widths[0], size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stem_pool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        before = widths[0]
        for name, count, width in zip(self.stages, blocks, widths, strict=True):
            first = SignBlock(before, width, 1 if name == "layer1" else 2)
            self.add_module(name, nn.Sequential(first, *(SignBlock(width, width) for _ in range(count - 1))))
            before = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_pool(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        scores: Tensor = self.linear(self.flatten(self.pool(x)))
        return scores


class ReActNetA(nn.Module):
    """MobileNetV1 of full convolutions with shortcuts, N×C×H×W to class scores N×K.

    Args:
        classes: number of outputs.
        channels: of the input image.
        stem: channels of the first convolution, which halves the image.
        widths: channels that each block gives out; the image is halved where they grow, but not in the first block.
    """

    def __init__(
        self,
        classes: int = 1000,
        channels: int = 3,
        stem: int = 32,
        widths: Sequence[int] = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024),
    ) -> None:
        super().__init__()
        self.classes, self.channels, self.stem, self.widths = classes, channels, stem, list(widths)
        self.conv1 = nn.Conv2d(channels, stem, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        pairs = list(zip([stem, *widths], widths, strict=False))
        strides = [1 if place == 0 or before == width else 2 for place, (before, width) in enumerate(pairs)]
        self.blocks = nn.Sequential(*(PairBlock(*pair, stride) for pair, stride in zip(pairs, strides, strict=True)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.bn1(self.conv1(x)))
        scores: Tensor = self.linear(self.flatten(self.pool(features)))
        return scores


def _shortcut(before: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and before == width:
        return nn.Identity()
    pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width))


def reactnet_a(classes: int = 1000, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ReActNet-A for 224×224 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(ReActNetA(classes, channels), weights)


def reactnet18(classes: int = 1000, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ReActNet-18 for 224×224 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(ReActNet([4] * 4, [64, 128, 256, 512], classes, channels, small=False), weights)


def reactnet20(classes: int = 10, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ReActNet of ResNet-20's size for 32×32 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(ReActNet([6] * 3, [16, 32, 64], classes, channels), weights)
