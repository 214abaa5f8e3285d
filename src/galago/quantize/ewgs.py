"""EWGS: element-wise gradient scaling.

Lee, Kim and Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv:2104.00903.

Rounding moves a value by `n - q`; the straight-through estimator ignores by how much and sends the same gradient
back. EWGS sends more where the value has yet to travel in the gradient step's direction, less where it is past its
level:

    n = clip((x - l) / (u - l), 0, 1),   q = round(N n) / N
    dL/dn = dL/dq (1 + delta sign(dL/dq) (n - q))

Inputs enter the layer as `q` in [0, 1], weights as `2 q - 1`, and the layer learns an output scale. `l` and `u` are
learned, one pair a tensor; the clip has slope 1 inside and on both ends. `delta = 0` is the straight-through estimator;
`galago.quantize.ewgs_delta.EWGSDelta` sets it from the curvature of the loss, as the paper does.

When to use it: 1 to 4 bits, starting from a trained float network. It costs a few element-wise operations and two sums
a tensor; nothing of delta survives training.

Recipe: recipes/quantize/ewgs_w4a4_resnet20_cifar10.yaml.

Chosen where the paper is silent: at 8 bits weights have 255 levels with a zero among them, so that codes fit a signed
byte (the paper stops at 4 bits, its levels are the odd multiples of 1/N). The interval is kept wider than 1e-8. Ranges
learn at 1/100 of the weights' rate (paper, CIFAR-10: 1e-5 against 1e-3) and do not decay.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from galago.quantize.blocks import in_blocks, inner_product
from galago.quantize.quantizer import (
    Affine,
    Grid,
    OwnRates,
    Quantizer,
    check_bits,
    codes_around_zero,
    grid_around_zero,
    largest_around_zero,
    steps_around_zero,
)

SMALLEST_WIDTH = 1e-8
HAIR = 1e-6  # of the interval: what a division may be off at its ends


def interval_code(x: Tensor, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Which of the `steps + 1` levels between `low` and `high` is nearest: 0, …, `steps`; halves go to even."""
    return (x - low).div_(interval_width(low, high) / steps).round_().clamp_(0, steps)


def interval_width(low: Tensor, high: Tensor) -> Tensor:
    """`u - l`, kept positive."""
    return (high - low).clamp_min(SMALLEST_WIDTH)


def scaled_gradient_round(
    x: Tensor, low: Tensor, high: Tensor, delta: Tensor, steps: int, centered: bool = False
) -> Tensor:
    """Level number k of `x` in the interval as `k / steps` in [0, 1], or centered as `2 k / steps - 1`.

    Args:
        x: values of any shape.
        low: lower end of the interval, a scalar; learned.
        high: upper end, likewise.
        delta: strength of the gradient scaling, a scalar; 0 is the straight-through estimator.
        steps: number of levels less one, N.
        centered: whether the values lie in [-1, 1] (weights).

    >>> x = torch.tensor([0.1, 0.9], requires_grad=True)
    >>> scaled_gradient_round(x, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.5), steps=1).sum().backward()
    >>> x.grad  # 1 + 0.5 * (0.1 - 0), 1 + 0.5 * (0.9 - 1)
    tensor([1.0500, 0.9500])
    """
    rounded: Tensor = _ScaledGradientRound.apply(x, low, high, delta, steps, centered)
    return rounded


class _ScaledGradientRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, delta: Tensor, steps: int, centered: bool) -> Tensor:
        ctx.save_for_backward(x, low, high, delta)
        ctx.steps, ctx.span = steps, 2.0 if centered else 1.0
        code = interval_code(x.to(torch.promote_types(x.dtype, low.dtype)), low, high, steps)
        if centered:
            code = codes_around_zero(code, steps)
        return code.mul_(1 / (largest_around_zero(steps) if centered else steps)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, high, delta = (saved.detach() for saved in ctx.saved_tensors)
        steps, width = ctx.steps, interval_width(low, high)
        distance, strength, slope = width / steps, delta / -steps, ctx.span / width

        def compute(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            place = (x.to(torch.promote_types(x.dtype, low.dtype)) - low).div_(distance)  # N n
            # One pass that is zero on or beyond two numbers. The ends of the interval belong to it.
            inside = torch.ops.aten.hardtanh_backward(grad.to(place.dtype), place, -HAIR, steps * (1 + HAIR))
            error = place.round().sub_(place).mul_(strength)  # delta (n - q)
            grad_n = with_gain(inside, error)
            return grad_n * slope, grad_n.sum(), inner_product(grad_n, place)

        grad_x, everywhere, toward_high = in_blocks(compute, x, grads[0])
        grad_high = toward_high * (-slope / steps)
        return grad_x.to(x.dtype), -slope * everywhere - grad_high, grad_high, None, None, None


def with_gain(grad: Tensor, error: Tensor) -> Tensor:
    """`grad (1 + sign(grad) error)`, the gain being a constant when this is differentiated again. May reuse `grad`."""
    if torch.is_grad_enabled():
        return grad * (1 + grad.detach().sign() * error)
    return grad.addcmul_(grad.abs(), error)


class EWGS(Quantizer):
    """Learned interval with element-wise gradient scaling, for a layer's input. Gives values in [0, 1].

    Args:
        bits: width of the integer, 1 to 8.
        fixed_delta: strength of the gradient scaling until `EWGSDelta` sets it (paper, without that: 0.001).
        learning_rate_factor: of the interval's learning rate, against the weights'.
    """

    normalized = True
    span = 1.0  # how wide the values lie
    delta: Tensor

    def __init__(self, bits: int = 4, fixed_delta: float = 0.0, learning_rate_factor: float = 0.01) -> None:
        super().__init__()
        check_bits("EWGS", bits)
        self.bits, self.fixed_delta, self.learning_rate_factor = bits, fixed_delta, learning_rate_factor
        self.low = nn.Parameter(torch.zeros(()))
        self.high = nn.Parameter(torch.ones(()))
        self.register_buffer("delta", torch.tensor(float(fixed_delta)))

    @property
    def steps(self) -> int:
        """Number of levels less one, N."""
        return int(2**self.bits) - 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """`l = min(x)`, `u = 3 std(x) / sqrt(1 - 2/pi)`: the spread of a normal variable whose positive half is `x`."""
        low = x.min()
        high = 3 * x.std(correction=int(x.numel() > 1)) / math.sqrt(1 - 2 / math.pi)
        self.low.copy_(low)
        self.high.copy_(torch.maximum(high, low + SMALLEST_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_gradient_round(x, self.low, self.high, self.delta, self.steps)

    def grid(self) -> Grid:
        zero = torch.zeros_like(self.low)
        return Grid(torch.full_like(zero, 1 / self.steps), zero, 0, self.steps)

    def encoder(self) -> Affine:
        width = interval_width(self.low, self.high).detach()
        return Affine(width / self.steps, self.low.detach().clone())

    def own_rates(self) -> OwnRates:
        return OwnRates(self.learning_rate_factor, weight_decay=0.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class EWGSWeight(EWGS):
    """Learned interval with element-wise gradient scaling, for weights. Gives values in [-1, 1]."""

    span = 2.0

    @property
    def steps(self) -> int:
        """Number of levels less one, N."""
        return steps_around_zero(self.bits)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """`u = 3 std(W)`, `l = -u`."""
        self.high.copy_((3 * x.std(correction=int(x.numel() > 1))).clamp_min(SMALLEST_WIDTH))
        self.low.copy_(-self.high)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_gradient_round(x, self.low, self.high, self.delta, self.steps, centered=True)

    def codes(self, x: Tensor) -> Tensor:
        return codes_around_zero(
            interval_code(x.float(), self.low.detach(), self.high.detach(), self.steps), self.steps
        )

    def grid(self) -> Grid:
        return grid_around_zero(torch.full_like(self.low, 1 / largest_around_zero(self.steps)).detach(), self.steps)

    def encoder(self) -> Affine:
        """In units of a code: the nearest code of the grid to `(W - offset) / scale` is the weight's."""
        codes_wide = 2 * self.grid().high
        width = interval_width(self.low, self.high).detach()
        return Affine(width / codes_wide, (self.low + width / 2).detach())
