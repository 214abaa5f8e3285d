"""What every quantizer promises, so that every quantizer can be exported.

A quantizer encodes a real tensor into integer codes and decodes them into the real values the layer computes with.
Every method decodes affinely, `value = scale * (code - zero_point)` (a `Grid`); encoders differ (`Affine` here).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from galago.errors import UserError

LARGEST_SAFE = 64


class Grid(NamedTuple):
    """The few values an integer runtime can hold: `(code - zero_point) * scale`, code in low, low + step, …, high.

    >>> grid = Grid(torch.tensor(0.5), torch.tensor(0.0), low=-2, high=1)
    >>> grid.values(torch.tensor([-2, 1]))
    tensor([-1.0000,  0.5000])
    """

    scale: Tensor  # one positive number, or one per slice along `axis`
    zero_point: Tensor  # integer-valued, of the shape of `scale` or a scalar
    low: int
    high: int
    step: int = 1  # 2 for grids without a zero, whose codes are odd integers
    axis: int | None = None

    def values(self, codes: Tensor) -> Tensor:
        """Codes (any dtype) to real values, float, same shape."""
        return (codes - along(self.zero_point, codes, self.axis)) * along(self.scale, codes, self.axis)


class Affine(NamedTuple):
    """How real values become codes: `clip(round((x - offset) / scale) + zero_point, low, high)` of the grid."""

    scale: Tensor
    offset: Tensor


class OwnRates(NamedTuple):
    """What a module asks of the optimizer for its own (direct) parameters."""

    learning_rate_factor: float = 1.0
    weight_decay: float | None = None  # None: as everything else


class Quantizer(nn.Module, ABC):
    """Rounds a tensor, differentiably. In evaluation mode `forward(x)` equals `grid().values(codes(x))` exactly.

    Every constructor argument is kept as an attribute of the same name: that is how a finished network is written
    down and rebuilt (`galago.run`).

    Attributes:
        bits: width of the integer.
        normalized: `forward` gives values whose size the paper leaves to the layer (EWGS: in [0, 1]), which then
            learns an output scale.
    """

    bits: int
    normalized: bool = False

    @property
    def rounds(self) -> bool:
        """Whether values go to the nearest code, which engines do in the layer before; else codes are an idea's own."""
        return type(self).codes is Quantizer.codes

    @abstractmethod
    def initialize(self, x: Tensor) -> None:
        """Sets the range from a tensor: the weights, or the first inputs. Called once, outside the training step."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The rounded tensor, with whatever gradient the paper gives it. Same shape and dtype."""

    @abstractmethod
    def grid(self) -> Grid:
        """Where the rounded values lie. Detached from the gradient."""

    def encoder(self) -> Affine:
        """How values become codes. Override where the encoder is not the decoder's inverse."""
        scale = self.grid().scale
        return Affine(scale, torch.zeros_like(scale))

    def codes(self, x: Tensor) -> Tensor:
        """The integer each value becomes, float32, same shape. Override where rounding is not to the nearest."""
        grid, encoder = self.grid(), self.encoder()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as `forward` computes, so that ties go the same way
        shifted = (wide - along(encoder.offset, x, grid.axis)) / along(encoder.scale, x, grid.axis)
        return (shifted.round() + along(grid.zero_point, x, grid.axis)).clamp(grid.low, grid.high).to(torch.float32)

    def own_rates(self) -> OwnRates:
        """Ranges are not weights: by default they learn at the common rate and do not decay."""
        return OwnRates(weight_decay=0.0)


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`scale * (clip(round(x / scale) + zero_point, low, high) - zero_point)`; gradient 1 where nothing is clipped.

    >>> x = torch.tensor([0.6, -9.0], requires_grad=True)
    >>> y = straight_through(x, torch.tensor(0.5), torch.tensor(1.0), 0, 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, -0.5], [1.0, 0.0])
    """
    rounded: Tensor = _StraightThrough.apply(x, scale, zero_point, low, high)
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high = low, high
        wide = x.to(torch.promote_types(x.dtype, scale.dtype))
        codes = (wide / scale).round_().add_(zero_point).clamp_(low, high)
        return codes.sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = (saved.detach() for saved in ctx.saved_tensors)
        codes = (x.to(torch.promote_types(x.dtype, scale.dtype)) / scale).round_().add_(zero_point)
        return unclipped(grads[0].to(codes.dtype), codes, ctx.low, ctx.high).to(x.dtype), None, None, None, None


def unclipped(grad: Tensor, codes: Tensor, low: int, high: int) -> Tensor:
    """`grad` where whole-numbered `codes` lie between `low` and `high`, 0 elsewhere."""
    if torch.compiler.is_compiling():  # no comparison, whose result the compiler would store, slowly, as booleans
        return grad * (1 - (codes - codes.clamp(low, high)).abs().clamp(max=1))
    # One pass that is zero on or beyond two numbers: those next to the ends.
    kept: Tensor = torch.ops.aten.hardtanh_backward(grad, codes, low - 1, high + 1)
    return kept


def doublings(grid: Grid) -> int:
    """How often a weight's codes can be doubled within ±64, counted from the zero point.

    Codes up to 64 never saturate the 16-bit pair sums of older x86 processors, and a doubled code halves the step that
    the accumulator, and so the bias, is held in.

    >>> doublings(Grid(torch.tensor(1.0), torch.tensor(0.0), low=-8, high=7))
    3
    """
    reach = max(abs(grid.low - float(grid.zero_point.max())), abs(grid.high - float(grid.zero_point.min())), 1.0)
    return max(0, int(math.log2(LARGEST_SAFE / reach)))


def along(per_slice: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A per-slice tensor shaped so that it broadcasts along `axis` of `x`; scalars pass through."""
    if axis is None or per_slice.ndim == 0:
        return per_slice
    return per_slice.view([-1 if dimension == axis else 1 for dimension in range(x.ndim)])


def integer_range(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Lowest and highest code; `narrow` leaves out the most negative one so that the range is symmetric.

    >>> integer_range(4, signed=True), integer_range(4, signed=False), integer_range(8, signed=True, narrow=True)
    ((-8, 7), (0, 15), (-127, 127))
    """
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1


def check_bits(method: str, bits: int, lowest: int = 1, highest: int = 8) -> None:
    """Refuses a width that a method does not have, by its name.

    Raises:
        UserError: `bits` is outside of `lowest` … `highest`.
    """
    if not lowest <= bits <= highest:
        raise UserError(f"{method}: bits is {bits}, but must be {lowest} to {highest} here")


def steps_around_zero(bits: int) -> int:
    """Levels less one, N, of a grid symmetric around 0; even at 8 bits, where the codes are to fit a signed byte.

    Odd N leaves no zero: codes are then the odd integers from -N to N.

    >>> steps_around_zero(2), steps_around_zero(8)
    (3, 254)
    """
    return 254 if bits == 8 else int(2**bits) - 1


def largest_around_zero(steps: int) -> int:
    """The last code of a grid symmetric around 0: N for odd N, N/2 for even."""
    return steps if steps % 2 else steps // 2


def codes_around_zero(level: Tensor, steps: int) -> Tensor:
    """Level numbers 0 … N to codes: odd integers `2k - N` for odd N, `k - N/2` for even. Changes `level`.

    >>> codes_around_zero(torch.tensor([0.0, 1.0, 3.0]), steps=3)
    tensor([-3., -1.,  3.])
    """
    return level.mul_(2).sub_(steps) if steps % 2 else level.sub_(steps // 2)


def grid_around_zero(scale: Tensor, steps: int) -> Grid:
    """Where such codes lie; `scale` is what one counts, a scalar."""
    largest = largest_around_zero(steps)
    return Grid(scale, torch.zeros_like(scale), -largest, largest, step=1 + steps % 2)
