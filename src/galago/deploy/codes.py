"""A quantized weight as int8 codes, one scale and one rule per output channel; and its bias as int32 codes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.quantize.quantizer import Quantizer, along, doublings

LARGEST_BIAS = 2**30  # leaves as much again for the accumulator
SMALLEST_SCALE = 1e-30  # products of two scales must stay normal float32 numbers


class WeightCodes(NamedTuple):
    """`value = scale_c * codes`, and where the codes come from: `codes = step_c * k + base_c`, k in 0 … 2^bits - 1.

    The rule is what lets a file store k in `bits` bits (`galago.deploy.pack`): a step of 2 for grids without a zero,
    a negative one where a BatchNorm flipped the channel, times the power of two that fills int8; 0 for a dead channel.
    """

    codes: Tensor  # int8, shape of the weight
    scale: Tensor  # float32, one per output channel
    step: Tensor  # int32, one per output channel
    base: Tensor  # int32, one per output channel
    bits: int


def centered(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """The weight's codes counted from the zero point, int32."""
    grid = quantizer.grid()
    return (quantizer.codes(weight) - along(grid.zero_point, weight, grid.axis)).round().to(torch.int32)


def flips_fit(layer: nn.Module, quantizer: Quantizer, factor: Tensor, axis: int) -> bool:
    """Whether no channel with a negative factor holds the one code, -128, whose opposite int8 lacks."""
    codes = centered(layer.get_parameter("weight").detach(), quantizer).transpose(0, axis)
    return not bool((codes[factor < 0] == -128).any())


def encode(
    weight: Tensor, quantizer: Quantizer, factor: Tensor, axis: int, bias: Tensor | None = None, unit: float = 0.0
) -> WeightCodes:
    """A weight as codes, with a factor per channel taken into the scale.

    Args:
        weight: as trained.
        quantizer: of the weight.
        factor: of each output channel (BatchNorm and output scale), float64, any sign or zero.
        axis: the weight's output channels.
        bias: what the layer adds in the end, float64, or None.
        unit: scale of the input's codes; 0 where the input stays float.
    """
    grid, channels = quantizer.grid(), weight.shape[axis]
    low = (grid.low - grid.zero_point).expand(channels).round().to(torch.int32)
    scale = (grid.scale.detach().double() * factor.abs()).expand(channels)
    exponent = widening(scale, bias, unit, doublings(grid)) if unit else torch.zeros_like(scale)
    alive = (factor != 0) & (scale * (unit or 1.0) > SMALLEST_SCALE) & (exponent >= 0)
    times = torch.where(alive, factor.sign() * 2.0**exponent, 0.0).to(torch.int32)
    return WeightCodes(
        (centered(weight, quantizer) * along(times, weight, axis)).to(torch.int8).contiguous(),
        torch.where(alive, scale / 2.0**exponent, constant_scale(scale, bias, unit)).float(),
        times * grid.step,
        times * low,
        max(1, math.ceil(math.log2((grid.high - grid.low) // grid.step + 1))),
    )


def widening(scale: Tensor, bias: Tensor | None, unit: float, most: int) -> Tensor:
    """How often each channel's codes may be doubled: up to ±64, and while the bias fits; negative if it never does."""
    times = torch.full_like(scale, float(most))
    if bias is not None:
        times = times.minimum((LARGEST_BIAS * scale * unit / bias.abs().clamp_min(1e-300)).log2())
    return times.floor()


def constant_scale(scale: Tensor, bias: Tensor | None, unit: float) -> Tensor:
    """A scale for a channel without weights: what remains, the bias, is held to 29 bits or to 2^-22."""
    if not unit:
        return torch.ones_like(scale)
    largest = torch.zeros_like(scale) if bias is None else bias.abs()
    return (largest / LARGEST_BIAS * 2).clamp_min(2.0**-22) / unit


def encode_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """A float64 bias in units of the accumulator, int32."""
    return (bias / scale.double()).round().to(torch.int32)
