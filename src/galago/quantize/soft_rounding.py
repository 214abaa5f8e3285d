"""Soft rounding: whether each weight goes up or down is learned, which AdaRound, BRECQ and QDrop have in common.

Every weight lies between two integers. How far up it goes is a rectified sigmoid h of a number V, which starts where
the weight is what it was in float and is driven to 0 or 1 while the unit's output is held close to that in float:

    W_hat = s (clip(floor(W / s) + h(V) + z, q_min, q_max) - z),   h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    loss  = distance(output, float output) + lambda sum(1 - |2 h(V) - 1|^beta),   beta from 20 down to 2

In the end V >= 0 goes up, V < 0 down. At the start that is rounding to the nearest, halves up.

Chosen here: a unit whose error would be larger than with rounding to the nearest keeps that rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.errors import UserError
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Grid, Quantizer, along
from galago.quantize.reconstruction import (
    Errors,
    Features,
    Learned,
    distance,
    error,
    kept_if_better,
    learning,
    minimize,
)
from galago.quantize.rest import Restable
from galago.quantize.rounding import weight_quantizer_of, write_codes
from galago.quantize.units import Unit

ZETA, GAMMA = 1.1, -0.1
WARM_UP = 0.2  # share of the iterations before roundings are driven apart
BETAS = (20.0, 2.0)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """How far up a weight goes, h(V) in [0, 1]; gradient 0 where it has arrived at an end."""
    stretched = torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA
    inside = (stretched > 0) & (stretched < 1)
    return torch.where(inside, stretched, stretched.detach().clamp(0, 1))


def initial_v(fraction: Tensor) -> Tensor:
    """The V at which h(V) is a fraction in [0, 1).

    >>> rectified_sigmoid(initial_v(torch.tensor([0.0, 0.25, 0.5])))
    tensor([0.0000, 0.2500, 0.5000])
    """
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def softly_rounded(floor: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """The weights that `floor + h(V)` steps stand for; gradient 0 beyond the outermost codes.

    Args:
        floor: W / s rounded down, whole numbers.
        v: of the same shape.
        grid: whose codes are one apart.
    """
    codes = floor + rectified_sigmoid(v) + along(grid.zero_point, floor, grid.axis)
    inside = (codes >= grid.low) & (codes <= grid.high)
    return grid.values(torch.where(inside, codes, codes.detach().clamp(grid.low, grid.high)))


def beta_at(iteration: int, iterations: int) -> float:
    """The exponent of the regularizer at an iteration, counted from 1.

    >>> [beta_at(t, 100) for t in (1, 20, 60, 100)]
    [20.0, 20.0, 11.0, 2.0]
    """
    high, low = BETAS
    done = max(0.0, iteration - WARM_UP * iterations) / ((1 - WARM_UP) * iterations)
    return low + (high - low) * (1 - done)


def undecided(v: Tensor, beta: float) -> Tensor:
    """`sum(1 - |2 h(V) - 1|^beta)`: 0 where every weight goes all the way up or down."""
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


class SoftWeight(nn.Module):
    """Stands in the place of a weight's quantizer while its rounding is learned.

    Args:
        quantizer: whose grid is rounded to.
        weight: as it was in float.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.grid = quantizer.grid()
        place = weight.detach().float() / along(self.grid.scale, weight, self.grid.axis)
        self.floor = place.floor()
        self.v = nn.Parameter(initial_v(place - self.floor))

    def forward(self, weight: Tensor) -> Tensor:
        return softly_rounded(self.floor, self.v, self.grid).to(weight.dtype)

    def codes(self) -> Tensor:
        """Each weight's integer, now that V has decided."""
        whole = self.floor + (self.v.detach() >= 0) + along(self.grid.zero_point, self.floor, self.grid.axis)
        return whole.clamp(self.grid.low, self.grid.high)


@contextmanager
def softened(layers: Mapping[str, QuantLayer]) -> Iterator[dict[str, SoftWeight]]:
    """Layers whose weights are rounded softly, as long as the `with` lasts."""
    hard = {path: weight_quantizer_of(layer) for path, layer in layers.items()}
    soft = {path: SoftWeight(hard[path], layer.layer.get_parameter("weight")) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.register_module("weight_quantizer", soft[path])
    try:
        yield soft
    finally:
        for path, layer in layers.items():
            layer.register_module("weight_quantizer", hard[path])


def require_keeps_codes(layers: Mapping[str, QuantLayer]) -> None:
    """Sees to it, before hours of work, that chosen integers can be written into all layers. Changes nothing.

    Raises:
        UserError: a weight quantizer has gaps between its codes, or would make other integers of what is written.
    """
    for path, layer in layers.items():
        quantizer, weight = weight_quantizer_of(layer), layer.layer.get_parameter("weight")
        if quantizer.grid().step != 1:
            raise UserError(
                f"{path}: {type(quantizer).__name__} has no zero at {quantizer.bits} bits, so its integers cannot be"
                " chosen one by one; use CalibratedWeight or LSQWeight"
            )
        before, codes = weight.detach().clone(), quantizer.codes(weight.detach())
        write_codes(path, layer, codes - codes.sign())
        with torch.no_grad():
            weight.copy_(before)


class Mixed(nn.Module):
    """A quantizer that leaves each value float with a probability.

    Args:
        quantizer: what rounds the others.
        share: the probability; 1 leaves all float.
    """

    def __init__(self, quantizer: nn.Module, share: float) -> None:
        super().__init__()
        self.quantizer, self.share = quantizer, share

    def forward(self, x: Tensor) -> Tensor:
        if self.share >= 1:
            return x
        rounded: Tensor = self.quantizer(x)
        return torch.where(torch.rand_like(x) < self.share, x, rounded)


@contextmanager
def partly_float(model: nn.Module, share: float) -> Iterator[None]:
    """Each value of inputs and streams stays float with a probability, as long as the `with` lasts.

    Quantizers that change the size of values, which the layer makes up for, go on as they are.
    """
    replaced = [
        (part, name, quantizer)
        for part in model.modules()
        if isinstance(part, Restable) and share > 0
        for name, quantizer in part.named_children()
        if name != "weight_quantizer" and isinstance(quantizer, Quantizer) and not quantizer.normalized
    ]
    for part, name, quantizer in replaced:
        part.register_module(name, Mixed(quantizer, share))
    try:
        yield
    finally:
        for part, name, quantizer in replaced:
            part.register_module(name, quantizer)


class Course(NamedTuple):
    """How roundings are learned."""

    iterations: int
    rate: float  # Adam's, of V
    regularizer: float  # lambda
    size: int  # images an iteration sees


def round_unit(
    model: nn.Module,
    unit: Unit,
    features: Features,
    course: Course,
    what: str,
    importance: Tensor | None = None,
    drop: float = 0.0,
    ranges: Sequence[Learned] = (),
) -> Errors:
    """Learns the roundings of a unit's weights and writes them into its layers.

    Args:
        model: the quantized network, within `mending`.
        unit: of it.
        features: what goes in and should come out.
        course: of the optimization.
        what: is done, for the person watching.
        importance: a factor for each value of the output's error.
        drop: the share of values of inputs and streams, and of what goes in, that stay float meanwhile.
        ranges: what is learned with the roundings.
    """
    layers = {p: layer for p, layer in unit.quant_layers(model).items() if layer.weight_quantizer is not None}
    weights = [layer.layer.get_parameter("weight") for layer in layers.values()]
    own = [parameter for group in ranges for parameter in group.parameters]
    parts = unit.parts(model)

    def learn() -> None:
        with softened(layers) as soft, partly_float(parts, drop), learning(own):

            def loss(picked: Tensor, iteration: int) -> Tensor:
                given = features.given[picked]
                if drop:
                    given = torch.where(torch.rand_like(given) < drop, features.plain[picked], given)
                factor = None if importance is None else importance[picked]
                value = distance(parts(given), features.target[picked], importance=factor)
                if iteration < WARM_UP * course.iterations:
                    return value
                beta = beta_at(iteration, course.iterations)
                return value + course.regularizer * sum(undecided(one.v, beta) for one in soft.values())

            learned = [Learned([one.v for one in soft.values()], course.rate), *ranges]
            minimize(loss, learned, len(features.given), course.size, course.iterations, what)
        for path, layer in layers.items():
            write_codes(path, layer, soft[path].codes())

    errors = kept_if_better([*weights, *own], lambda: error(model, unit, features, importance=importance), learn)
    for path, layer in layers.items():  # what was kept as it was is still float
        write_codes(path, layer, weight_quantizer_of(layer).codes(layer.layer.get_parameter("weight").detach()))
    return errors


def table_of(method: str, errors: Mapping[str, Errors]) -> Table:
    """What was gained, a row a unit."""
    made = Table("unit", "error, rounded to the nearest", f"error with {method}", "share")
    for name, (nearest, learned) in errors.items():
        made.add_row(name, f"{nearest:.4g}", f"{learned:.4g}", f"{learned / max(nearest, 1e-30):.2f}")
    return made
