"""Calibrated: ranges found on a few images and then kept, for quantization without any training.

Nagel et al., "A White Paper on Neural Network Quantization", 2021, arXiv:2106.08295, sections 3.1 and 3.4; the searches
themselves are told, with their sources, in `galago.quantize.ranges`.

A trained network is quantized as it is: weights take the range in which rounding them costs least, inputs and streams
the range that most of what they carry lies in. Nothing follows the data afterwards.

    inputs   s = (M - m) / (2^b - 1),  z = clip(round(-m / s), 0, 2^b - 1),  x_hat = s (clip(round(x / s) + z) - z)
    weights  s_c = max(|m_c|, |M_c|) / ((q_max - q_min) / 2) for each output channel c, z = 0

When to use it: 8 bits in minutes, from 0 to some 1,000 images without labels, in a recipe with `epochs: 0`. At 4 bits
and below use what repairs or chooses roundings behind it, or train: gradients pass straight through where nothing is
clipped. It costs one pass over the images and a search for each tensor.

Recipe: recipes/quantize/ptq_w8a8_resnet20_cifar10.yaml.

Design choices: inputs take the percentile, which forgives single outliers, weights the search by error of BRECQ's code
with p = 2.4. Searches by error look at a million values of a tensor, drawn at random, and at its ends. Signed 8-bit
weights leave out the code -128, so that flipping their signs on export cannot overflow; fewer bits use every code. A
scale is at least 1e-8.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from galago.errors import UserError
from galago.quantize.quantizer import Grid, Quantizer, along, check_bits, integer_range, straight_through
from galago.quantize.ranges import (
    Range,
    affine,
    deviations,
    entropy,
    least_error,
    percentile,
    rounding,
    rows_of,
    sample,
    spanned,
    symmetric,
)

Search = Literal["min_max", "percentile", "mse", "entropy", "std"]


class Calibrated(Quantizer):
    """A range found once, for what flows through a network: a layer's input, a residual stream.

    Args:
        bits: width of the integer, 1 to 8.
        search: `min_max`, `percentile`, `mse`, `entropy` or `std`.
        share: of all values that `percentile` covers.
        power: of the errors that `mse` adds up.
        deviations: how many standard deviations around the mean `std` covers.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int = 8,
        search: Search = "percentile",
        share: float = 0.99999,
        power: float = 2.4,
        deviations: float = 3.0,
    ) -> None:
        super().__init__()
        check_bits("Calibrated", bits, lowest=1)
        check_search("Calibrated", search, share, power, deviations)
        self.bits, self.search, self.share, self.power, self.deviations = bits, search, share, power, deviations
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, signed=False)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Searches the range of `x`."""
        rows = rows_of(x, per_channel=False)
        if self.search == "mse":
            rows = sample(rows)
            found = least_error(rows, rounding(rows, affine, *self.limits), self.power)
        else:
            one_sided = bool((rows >= 0).all() | (rows <= 0).all())
            levels = max(1, 2**self.bits if one_sided else 2 ** (self.bits - 1))
            found = searched(rows, self.search, levels, self.share, self.deviations)
        coding = affine(found, *self.limits)
        self.scale.copy_(coding.scale[0])
        self.zero_point.copy_(coding.zero_point[0])

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, self.scale, self.zero_point, *self.limits)

    def grid(self) -> Grid:
        return Grid(self.scale.clone(), self.zero_point.clone(), *self.limits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, search={self.search!r}"


class CalibratedWeight(Quantizer):
    """A range found once for weights: symmetric, one for each output channel or one for all.

    Args:
        bits: width of the integer, 2 to 8.
        search: `min_max`, `percentile`, `mse`, `entropy` or `std`.
        per_channel: one range for each slice along the weight's first axis.
        power: of the errors that `mse` adds up.
        share: of all values that `percentile` covers.
        deviations: how many standard deviations around the mean `std` covers.
    """

    scale: Tensor

    def __init__(
        self,
        bits: int = 8,
        search: Search = "mse",
        per_channel: bool = True,
        power: float = 2.4,
        share: float = 0.99999,
        deviations: float = 3.0,
    ) -> None:
        super().__init__()
        check_bits("CalibratedWeight", bits, lowest=2)
        check_search("CalibratedWeight", search, share, power, deviations)
        self.bits, self.search, self.per_channel = bits, search, per_channel
        self.power, self.share, self.deviations = power, share, deviations
        self.register_buffer("scale", torch.ones(()))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, signed=True, narrow=self.bits == 8)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Gives the scale its shape (a scalar, or one element an output channel) and searches its value."""
        rows = rows_of(x, self.per_channel)
        if self.search == "mse":
            found = least_error(rows, rounding(rows, symmetric, *self.limits), self.power)
        else:
            found = searched(rows, self.search, 2 ** (self.bits - 1), self.share, self.deviations)
        scale = symmetric(found, *self.limits).scale.float()
        self.scale = scale if self.per_channel else scale[0]

    def forward(self, x: Tensor) -> Tensor:
        scale = along(self.scale, x, 0)
        return straight_through(x, scale, torch.zeros_like(scale), *self.limits)

    def grid(self) -> Grid:
        axis = 0 if self.per_channel else None
        return Grid(self.scale.clone(), torch.zeros_like(self.scale), *self.limits, axis=axis)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, search={self.search!r}, per_channel={self.per_channel}"


def searched(rows: Tensor, search: Search, levels: int, share: float, count: float) -> Range:
    """The range of each row by any search that does not depend on how values are rounded.

    Args:
        rows: values, a row a range.
        search: which.
        levels: on one side of 0, for `entropy`.
        share: of the values, for `percentile`.
        count: of standard deviations, for `std`.
    """
    if search == "percentile":
        return percentile(rows, share)
    if search == "entropy":
        return entropy(rows, levels)
    return deviations(rows, count) if search == "std" else spanned(rows)


def check_search(method: str, search: str, share: float, power: float, count: float) -> None:
    """Refuses what is no search or cannot be searched for.

    Raises:
        UserError: naming the argument.
    """
    if search not in get_args(Search):
        raise UserError(f"{method}: search is {search!r}, but must be one of {', '.join(get_args(Search))}")
    if not 0 < share <= 1:
        raise UserError(f"{method}: share is {share:g}, but must be above 0 and at most 1")
    for name, value in (("power", power), ("deviations", count)):
        if not value > 0:
            raise UserError(f"{method}: {name} is {value:g}, but must be above 0")
