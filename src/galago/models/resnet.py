"""ResNet for small images: 20, 32, 44, 56 and 110 layers for 32×32 pixels, and the wider ResNet-18 for the same size.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, section 4.2.

A 3×3 convolution, three stages of n blocks with 16, 32 and 64 channels (depth 6n + 2), global average pooling and one
linear layer. A block gives `relu(F(x) + shortcut(x))` with two 3×3 convolutions in F. Where a stage halves the image
the shortcut has no parameters ("option A"): every second pixel, and zeros for the channels that are new.

When to use it: the networks that most papers on quantization, pruning and distillation compare on CIFAR.
ResNet-20 has 269,722 parameters and 40,551,040 multiply-accumulates an image, ResNet-56 853,018 and 125,485,696.
Layer names are those of the widely used published weights, which `weights` therefore loads as they are.

`resnet18_cifar` is the ResNet-18 of ImageNet with a 3×3 stem and no max-pooling: 64 to 512 channels, two blocks a
stage, and 1×1 convolutions in the shortcuts ("option B"); 11,173,962 parameters, 555,422,720 multiply-accumulates.

Chosen where the paper is silent: the zeros of option A go half before, half after the copied channels, as in the
published weights; each ReLU is a module of its own, called once, so that it can be watched or replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from galago.models.weights import load_weights


class ResNet(nn.Module):
    """Residual network of basic blocks for small images, N×C×H×W to class scores N×K.

    Args:
        blocks: how many blocks each stage has.
        widths: channels of each stage; every stage but the first halves the image.
        classes: number of outputs.
        channels: of the input image.
        project: shortcuts between stages are 1×1 convolutions (option B) instead of parameter-free (option A).
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], classes: int = 10, channels: int = 3, project: bool = False
    ) -> None:
        super().__init__()
        self.blocks, self.widths = list(blocks), list(widths)
        self.classes, self.channels, self.project = classes, channels, project
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        before = widths[0]
        for name, count, width in zip(self.stages, blocks, widths, strict=True):
            stride = 1 if name == "layer1" else 2
            self.add_module(name, _stage(before, width, count, stride, project))
            before = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(before, classes)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        scores: Tensor = self.linear(self.flatten(self.pool(x)))
        return scores


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them.

    Args:
        before: channels that come in.
        width: channels that go out.
        stride: of the first convolution and of the shortcut.
        project: the shortcut is a 1×1 convolution where the shape changes.
    """

    def __init__(self, before: int, width: int, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        self.before, self.width, self.stride, self.project = before, width, stride, project
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(before, width, stride, project)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        output: Tensor = self.relu2(inner + self.shortcut(x))
        return output


class Subsample(nn.Module):
    """Option A: every `stride`-th pixel, with zero channels on both sides until there are `width`.

    Args:
        before: channels that come in.
        width: channels that go out.
        stride: distance between the pixels that stay.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.before, self.width, self.stride = before, width, stride
        self.first = (width - before) // 2
        self.last = width - before - self.first

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.first, self.last))

    def keep_channels(self, taken: Tensor, given: Tensor) -> None:
        """Fewer channels, as `galago.sizes.Narrows` has it."""
        first, last = given[: self.first], given[self.width - self.last :]
        self.before, self.width = int(taken.sum()), int(given.sum())
        self.first, self.last = int(first.sum()), int(last.sum())


def _shortcut(before: int, width: int, stride: int, project: bool) -> nn.Module:
    if stride == 1 and before == width:
        return nn.Identity()
    if project:
        return nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return Subsample(before, width, stride)


def _stage(before: int, width: int, count: int, stride: int, project: bool) -> nn.Sequential:
    first = BasicBlock(before, width, stride, project)
    return nn.Sequential(first, *(BasicBlock(width, width, 1, project) for _ in range(count - 1)))


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _cifar(depth: int, classes: int, channels: int, weights: Path | None) -> nn.Module:
    count = (depth - 2) // 6
    return load_weights(ResNet([count] * 3, [16, 32, 64], classes, channels), weights)


def resnet20(classes: int = 10, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ResNet-20 for 32×32 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return _cifar(20, classes, channels, weights)


def resnet32(classes: int = 10, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ResNet-32 for 32×32 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return _cifar(32, classes, channels, weights)


def resnet44(classes: int = 10, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ResNet-44 for 32×32 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return _cifar(44, classes, channels, weights)


def resnet56(classes: int = 10, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ResNet-56 for 32×32 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return _cifar(56, classes, channels, weights)


def resnet110(classes: int = 10, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ResNet-110 for 32×32 images.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return _cifar(110, classes, channels, weights)


def resnet18_cifar(classes: int = 10, channels: int = 3, weights: Path | None = None) -> nn.Module:
    """ResNet-18 with a 3×3 stem and no max-pooling, for images of 32 to 64 pixels.

    Args:
        classes: number of outputs.
        channels: of the input image.
        weights: file with a state dict (.th, .pt, .pth, .safetensors) to start from.
    """
    return load_weights(ResNet([2] * 4, [64, 128, 256, 512], classes, channels, project=True), weights)
