"""Quantizers of every shape, a network of every kind of layer, and both put together: what deployment is tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Normalize
from galago.deploy.integer_layers import IntegerStream
from galago.layers import find, swap
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantizer import Affine, Grid, Quantizer, integer_range
from galago.tasks.classify import Classify

Maker = Callable[[], Quantizer | None]


class PerChannel(Quantizer):
    """Signed weights, one scale a channel, the whole range of the integer."""

    def __init__(self, bits: int = 4, axis: int = 0) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self.scale = nn.Parameter(torch.ones(()))

    def initialize(self, x: Tensor) -> None:
        self.scale.data = x.transpose(0, self.axis).flatten(1).abs().amax(1) / 2 ** (self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid().values(self.codes(x))

    def grid(self) -> Grid:
        scale = self.scale.detach()
        return Grid(scale, torch.zeros_like(scale), *integer_range(self.bits, signed=True), axis=self.axis)


class Odd(Quantizer):
    """Weights without a zero, one scale for all, in [-1, 1] as EWGS has them."""

    normalized = True

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        self.bits = bits
        self.width = nn.Parameter(torch.ones(()))

    def initialize(self, x: Tensor) -> None:
        self.width.data = 3 * x.std()

    def forward(self, x: Tensor) -> Tensor:
        return self.grid().values(self.codes(x))

    def codes(self, x: Tensor) -> Tensor:
        top = 2**self.bits - 1
        return 2 * ((x / self.width + 1) / 2 * top).round().clamp(0, top) - top

    def grid(self) -> Grid:
        top = 2**self.bits - 1
        return Grid(torch.tensor(1 / top), torch.tensor(0.0), -top, top, step=2)


class Interval(Quantizer):
    """Inputs in a learned interval given as [0, 1]: encoder and decoder have different scales, and an offset."""

    normalized = True

    def __init__(self, bits: int = 4, offset: float = 0.1) -> None:
        super().__init__()
        self.bits, self.offset = bits, offset
        self.top = nn.Parameter(torch.ones(()))

    def initialize(self, x: Tensor) -> None:
        self.top.data = 0.8 * x.max()

    def forward(self, x: Tensor) -> Tensor:
        return self.grid().values(self.codes(x))

    def grid(self) -> Grid:
        return Grid(torch.tensor(1.0 / (2**self.bits - 1)), torch.tensor(0.0), 0, 2**self.bits - 1)

    def encoder(self) -> Affine:
        width = self.top.detach() - self.offset
        return Affine(width / (2**self.bits - 1), torch.tensor(self.offset))


class Ranged(Quantizer):
    """Inputs and streams between their smallest and largest value, with a zero point."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits
        self.scale, self.zero = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def initialize(self, x: Tensor) -> None:
        low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
        self.scale.data = ((high - low) / (2**self.bits - 1)).clamp_min(1e-8)
        self.zero.data = (-low / self.scale.data).round()

    def forward(self, x: Tensor) -> Tensor:
        return self.grid().values(self.codes(x))

    def grid(self) -> Grid:
        return Grid(self.scale.detach(), self.zero.detach(), 0, 2**self.bits - 1)


class Signed(Ranged):
    """Inputs and streams symmetric around zero, in signed codes."""

    def initialize(self, x: Tensor) -> None:
        self.scale.data = x.abs().amax() / 2 ** (self.bits - 1)

    def grid(self) -> Grid:
        return Grid(self.scale.detach(), torch.zeros(()), *integer_range(self.bits, signed=True))


class Thresholds(Ranged):
    """Inputs with an encoder that is not affine."""

    def codes(self, x: Tensor) -> Tensor:
        levels = torch.arange(1, 2**self.bits) ** 1.5 * self.scale.detach()
        return (x.unsqueeze(-1) > levels).sum(-1).float()


class Zoo(nn.Module):
    """Odd channel counts, stride, depth-wise, groups, ReLU6, a residual sum, global pooling, linear."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.depth, self.norm1 = nn.Conv2d(7, 7, 3, stride=2, padding=1, groups=7, bias=False), nn.BatchNorm2d(7)
        self.point, self.norm2 = nn.Conv2d(7, 9, 1, bias=False), nn.BatchNorm2d(9)
        self.group, self.norm3 = nn.Conv2d(9, 9, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(9)
        self.last, self.norm4 = nn.Conv2d(9, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9)
        self.relu0, self.relu6, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU6(), nn.ReLU(), nn.ReLU()
        self.relu4 = nn.ReLU(inplace=True)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(9, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.norm0(self.stem(x)))
        x = self.relu6(self.norm1(self.depth(x)))
        x = self.relu2(self.norm2(self.point(x)))
        y = self.relu3(self.norm3(self.group(x)))
        x = self.relu4(x + self.norm4(self.last(y)))
        return self.fc(self.pool(x).flatten(1))


STREAMS = ("relu2", "norm4", "relu4")


def shaken(network: nn.Module) -> nn.Module:
    """Statistics and gains as after training: some gains negative, one of them zero in each BatchNorm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.6, 0.7)
            module.weight.data[1] = 0
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.2, 1)
    return network.eval()


def quantize(network: nn.Module, x: Tensor, weight: Maker, given: Maker, stream: Maker, streams: tuple[str, ...] = ()):
    """Every convolution and linear layer quantized, and what some modules give; ranges set on `x`."""
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            network = swap(network, path, QuantLayer(module, weight(), given()))
    for path in streams:
        network = swap(network, path, QuantOutput(find(network, path), stream()))
    for module in network.modules():
        if isinstance(module, QuantLayer | QuantOutput):
            module.observing = True
    with torch.no_grad():
        network.eval()(x)
    return network


def deployed(network: nn.Module, classes: int = 5) -> Deployed:
    """The network behind a normalization, as it is exported."""
    return Deployed(network, Normalize([0.5, 0.4, 0.3], [0.25, 0.2, 0.3]), Classify(classes)).eval()


def images(count: int, size: int = 12) -> Tensor:
    """Random raw images."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


class Exported(NamedTuple):
    """A network as trained, in integers, and in files."""

    trained: Deployed
    integer: Deployed
    onnx: Path
    xml: Path

    def codes(self, image: Tensor) -> dict[str, Tensor]:
        """What every stream of the integer module gives."""
        found: dict[str, Tensor] = {}

        def keep(path: str):
            return lambda stream, given: found.__setitem__(path, stream.codes(given[0]))

        streams = [(path, m) for path, m in self.integer.network.named_modules() if isinstance(m, IntegerStream)]
        handles = [stream.register_forward_pre_hook(keep(path)) for path, stream in streams]
        with torch.no_grad():
            self.integer(image)
        for handle in handles:
            handle.remove()
        return found
