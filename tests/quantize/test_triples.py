"""Every weight quantizer with every input quantizer, and gradient quantizers with both: one training step each.

What the catalogue lists is found by itself, so a new quantizer is tried with all others as soon as its file is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import signature
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from galago.catalogue import ideas
from galago.quantize.gradient_quantizer import GradientQuantizer, QuantGradient, gradient_quantizers
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Quantizer


def found(kind: str) -> dict[str, type]:
    """Classes of a kind, by name."""
    paths = [idea.class_path.rpartition(".") for idea in ideas() if idea.kind == kind]
    return {name: getattr(import_module(module), name) for module, _, name in paths}


QUANTIZERS, GRADIENTS = found("quantizer"), found("quantizer of gradients")
WEIGHTS = {name: kind for name, kind in QUANTIZERS.items() if name.endswith("Weight")}
INPUTS = {name: kind for name, kind in QUANTIZERS.items() if name not in WEIGHTS}


def made(kind: Callable[..., Quantizer], bits: int = 2) -> Quantizer:
    return kind(bits=bits) if "bits" in signature(kind).parameters else kind()


class Net(nn.Module):
    """Stride 2, odd channels, groups, a depth-wise layer and a linear one; all but what stands between is quantized."""

    def __init__(self, weight: type, inputs: type, gradient: type | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(6, 9, 3, padding=1, groups=3),
            nn.Conv2d(9, 9, 3, padding=1, groups=9),
            nn.Linear(9, 5),
        ]
        quant: list[nn.Module] = [QuantLayer(layer, made(weight), made(inputs)) for layer in layers]
        if gradient is not None:
            quant = [QuantGradient(layer, gradient(bits=4)) for layer in quant]
        self.first, self.grouped, self.depthwise, self.head = quant
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.first(x)).relu()).relu()
        return self.head(self.depthwise(x).relu().mean((2, 3)))


def quant_layers(net: nn.Module) -> Iterator[QuantLayer]:
    return (layer for layer in net.modules() if isinstance(layer, QuantLayer))


def trained(net: Net, x: Tensor) -> Net:
    """After ranges are set and one step; all gradients and parameters finite."""
    for layer in quant_layers(net):
        layer.observing = True
    net.train()(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    loss = nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 5)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, f"{name} has no gradient"
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    for quantizer in gradient_quantizers(net).values():
        quantizer.adapt()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    return net.eval()


@torch.no_grad()
def keeps_its_promises(quantizer: Quantizer, x: Tensor) -> None:
    """In evaluation mode values are those of whole codes on the grid, and no more than its bits can tell apart."""
    y, codes, grid = quantizer(x), quantizer.codes(x), quantizer.grid()
    assert torch.equal(y, grid.values(codes))
    assert torch.equal(codes, codes.round())
    assert grid.low <= codes.min() <= codes.max() <= grid.high
    assert len(codes.unique()) <= 2**quantizer.bits


@torch.no_grad()
def check(net: Net, again: Net, x: Tensor) -> None:
    """Every quantizer of a network on what it really gets; a copy and a network that takes its state answer alike."""
    caught: dict[QuantLayer, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: caught.update({layer: args[0]}))
        for layer in quant_layers(net)
    ]
    expected = net(x)
    for handle in handles:
        handle.remove()
    for layer, given in caught.items():
        assert layer.weight_quantizer is not None
        assert layer.input_quantizer is not None
        keeps_its_promises(layer.weight_quantizer, layer.layer.get_parameter("weight"))
        keeps_its_promises(layer.input_quantizer, given)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    for layer in quant_layers(again):  # which gives ranges their shapes, as the one that is taken over had
        layer.observing = True
    again.train()(x)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(x), expected)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_each_weight_quantizer_trains_with_every_input_quantizer(weight: str) -> None:
    x = torch.randn(5, 3, 7, 6)
    for name, inputs in INPUTS.items():
        torch.manual_seed(0)
        net, again = Net(WEIGHTS[weight], inputs), Net(WEIGHTS[weight], inputs)
        try:
            check(trained(net, x), again, x)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"{weight} with {name}: {error}") from error


def some_pairs() -> list[tuple[str, str]]:
    """Two pairs, with and without an output scale that is learned."""
    return [("LSQWeight", "LSQ"), ("EWGSWeight", "EWGS")]


@pytest.mark.parametrize(("gradient", "pair"), list(product(GRADIENTS, some_pairs())))
def test_each_gradient_quantizer_trains_with_both_others(gradient: str, pair: tuple[str, str]) -> None:
    kind, x = GRADIENTS[gradient], torch.randn(5, 3, 7, 6)
    assert issubclass(kind, GradientQuantizer)
    nets = [Net(WEIGHTS[pair[0]], INPUTS[pair[1]], kind) for _ in range(2)]
    check(trained(nets[0], x), nets[1], x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one dimension": (lambda: nn.Conv1d(4, 5, 3, 2), (2, 4, 9)),
    "one dimension, depth-wise": (lambda: nn.Conv1d(5, 5, 3, padding=1, groups=5), (2, 5, 9)),
    "three dimensions": (lambda: nn.Conv3d(3, 5, 2, 2), (2, 3, 4, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(5, 7, 3, 2, 1, output_padding=1), (2, 5, 4, 3)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(6, 9, 3, 2, groups=3), (2, 6, 4, 3)),
    "transposed, depth-wise": (lambda: nn.ConvTranspose1d(4, 4, 3, 2, groups=4), (2, 4, 5)),
    "transposed, three dimensions": (lambda: nn.ConvTranspose3d(3, 5, 2), (2, 3, 3, 4, 3)),
    "a weight a channel": (lambda: nn.Conv2d(1, 2, 1), (2, 1, 3, 3)),
    "linear on tokens": (lambda: nn.Linear(7, 5), (2, 3, 7)),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_each_weight_quantizer_serves_layers_of_every_kind(weight: str) -> None:
    for name, (make, shape) in LAYERS.items():
        torch.manual_seed(0)
        quant, x = QuantLayer(make(), made(WEIGHTS[weight])), torch.randn(shape, requires_grad=True)
        quant.observe(x.detach())
        quant(x).square().sum().backward()
        for parameter in (x, *quant.parameters()):
            assert parameter.grad is not None, f"{name}: {tuple(parameter.shape)}"
            assert parameter.grad.isfinite().all(), name
        assert quant.weight_quantizer is not None
        keeps_its_promises(quant.eval().weight_quantizer, quant.layer.get_parameter("weight"))


def test_there_are_quantizers_of_every_kind() -> None:
    assert WEIGHTS.keys() >= {"LSQWeight", "EWGSWeight", "DAQWeight", "MinMaxWeight"}
    assert INPUTS.keys() >= {"LSQ", "EWGS", "DAQ", "MinMax", "N2UQ"}
    assert GRADIENTS.keys() >= {"AdaptiveInterval"}
