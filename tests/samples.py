"""A data set and networks that train in a blink, and a method that kills a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data, Normalize
from galago.layers import swap
from galago.method import Forward, Method
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantizer import Quantizer
from galago.testing import tiny_network


class Batches(list[Batch]):
    """A loader that is a list."""


class Stripes(Data):
    """Two-class images, 3×8×8: vertical or horizontal stripes in noise. A pure function of seed and epoch."""

    classes = ("vertical", "horizontal")

    def __init__(self, images: int = 48, batch_size: int = 16, size: int = 8) -> None:
        self.images, self.batch_size, self.size = images, batch_size, size
        self.normalize = Normalize([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])

    def draw(self, generator: torch.Generator, first: int) -> Batch:
        label = torch.randint(2, (self.batch_size,), generator=generator)
        stripes = 96.0 * (torch.arange(self.size) % 2)
        picture = torch.where(label.view(-1, 1, 1) == 0, stripes.view(1, 1, -1), stripes.view(1, -1, 1))
        noise = torch.randint(0, 128, (self.batch_size, 3, self.size, self.size), generator=generator)
        image = (picture.unsqueeze(1) + noise).to(torch.uint8)
        index = torch.arange(first, first + self.batch_size)
        return Batch(image, nn.functional.one_hot(label, 2).float(), {"index": index})

    def epoch(self, seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        return Batches(self.draw(generator, first) for first in range(0, self.images, self.batch_size))

    def train(self, epoch: int = 0, start: int = 0) -> Batches:
        return Batches(self.epoch(1000 * self.seed + epoch + 1)[start:])

    def validation(self) -> Batches:
        return self.epoch(0)

    def example(self) -> Tensor:
        return self.validation()[0].input[:1]


class SmallNet(nn.Module):
    """Convolution, BatchNorm, ReLU, a residual block with an odd number of channels, global pooling, linear."""

    def __init__(self, classes: int = 2, width: int = 7) -> None:
        super().__init__()
        self.classes, self.width = classes, width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(x + self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).flatten(1))


class Stopped(BaseException):
    """Like a kill: nothing in the program handles it."""


class StopAt(Method):
    """Dies in the middle of the training, at a batch of an epoch."""

    at = 0  # the class's, as a recipe must not differ between the two halves of a run

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.seen += 1
        if self.seen == self.at:
            raise Stopped
        return inner(batch)


def quantized_tiny_network(weight: Quantizer | None = None, inputs: Quantizer | None = None) -> nn.Module:
    """The laws' network with one quantized layer, LSQ at 4 bits unless told otherwise, its range set."""
    model = tiny_network()
    path, layer = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    quant = QuantLayer(layer, weight or LSQWeight(4), inputs or LSQ(4))
    model = swap(model, path, quant)
    quant.observe(torch.rand(4, layer.in_channels, 8, 8))
    return model
