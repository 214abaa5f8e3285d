"""Trying widths on a network: how far its answers move when one layer alone is rounded and all else is float.

What methods that choose widths have in common. Roundings are to the nearest, in the range that costs least squared
error, so that they speak of the layer and not of where its quantizers' ranges start, which training moves. The layer's
weight is changed in place and put back to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from galago.layers import Wrapper, removing
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import integer_range
from galago.quantize.ranges import affine, least_error, rounding, rows_of, sample, symmetric
from galago.quantize.rest import restable
from galago.quantize.rounding import weight_quantizer_of

LOOKED_AT = 2**14  # values of an input, for its range
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def divergence(y: Tensor, y_hat: Tensor) -> float:
    """Mean KL divergence of the class distributions, in nats; for one column the squared error relative to its size.

    Args:
        y: scores N×K×… of the float network.
        y_hat: of the other.
    """
    y, y_hat = y.double(), y_hat.double()
    if y.ndim < 2 or y.shape[1] == 1:
        return float((y_hat - y).square().mean() / y.square().mean().clamp_min(1e-30))
    p, q = y.log_softmax(1), y_hat.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


class Facts(NamedTuple):
    """What is known of a layer before widths are tried."""

    layer: QuantLayer
    weights: int
    macs: int  # of one image
    inputs: Tensor  # some of the values that it takes in, one row


def original(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, QuantLayer | None]]:
    """Every module of a network under the path it had before layers were wrapped, with the `QuantLayer` around it."""
    quant = None
    while isinstance(module, Wrapper):
        quant = module if isinstance(module, QuantLayer) else quant
        module = module.layer
    yield path, module, quant
    for name, child in module.named_children():
        yield from original(child, f"{path}.{name}" if path else name)


@contextmanager
def states(model: nn.Module) -> Iterator[None]:
    """Which parts rest may be changed as long as the `with` lasts; afterwards it is as before."""
    before = [(part, part.resting) for part in restable(model)]
    try:
        yield
    finally:
        for part, resting in before:
            part.resting = resting


def known(model: nn.Module, layers: dict[str, QuantLayer], images: Tensor) -> dict[str, Facts]:
    """Sizes of all layers and some of their float inputs, from one pass; in the order of execution."""
    found: dict[str, Facts] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, QuantLayer)
            weight, (x,) = layer.layer.get_parameter("weight"), inputs
            passed = x if isinstance(layer.layer, TRANSPOSED) else output
            macs = passed.numel() // len(x) * weight[0].numel()
            found[path] = Facts(layer, weight.numel(), macs, sample(rows_of(x, per_channel=False), LOOKED_AT))

        return hook

    handles = [layer.register_forward_hook(note(path)) for path, layer in layers.items()]
    with removing(handles):
        model(images)
    return found


@contextmanager
def rounded(fact: Facts, bits: int, inputs: bool) -> Iterator[None]:
    """A layer at rest computes with a weight, and an input, rounded to the nearest, as long as the `with` lasts."""
    inner = fact.layer.layer
    weight = inner.get_parameter("weight")
    before = weight.detach().clone()
    rows = rows_of(weight, weight_quantizer_of(fact.layer).grid().axis == 0)
    to_nearest = rounding(rows, symmetric, *integer_range(bits, signed=True))
    weight.copy_(to_nearest(least_error(rows, to_nearest, power=2.0)).view_as(weight))
    low, high = integer_range(bits, signed=False)
    values = rounding(fact.inputs, affine, low, high)
    scale, zero_point = (each[0] for each in affine(least_error(fact.inputs, values, power=2.0), low, high))

    def change(layer: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        return ((given[0] / scale).round() + zero_point).clamp(low, high).sub(zero_point).mul(scale)

    handle = inner.register_forward_pre_hook(change) if inputs else None
    try:
        yield
    finally:
        weight.copy_(before)
        if handle is not None:
            handle.remove()
