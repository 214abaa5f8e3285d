"""DAQ: distance-aware quantization.

Kim, Lee and Ham, "Distance-aware Quantization", ICCV 2021, arXiv:2108.06983.

Training with soft assignments has honest gradients, but the network that is trained is not the rounded one that ships.
DAQ assigns softly with a temperature of each value's own, chosen so that the result is exactly the rounded value:
forward is hard, backward is the soft assignment's gradient, largest halfway between two levels, where rounding matters.

    t = clip(N (x - l) / (u - l), 0, N),   f = t - floor(t),   its two neighbors at q = 0 and q = 1
    s(q) = exp(-|f - q|) exp(-(q - q*)^2 / sigma^2),   q* the nearer one
    p = softmax(T s),   T = gamma / |s(0) - s(1)|, detached: the temperature controller
    R(t) = floor(t) - p(0) / (e^gamma - 1) + p(1) (1 + 1 / (e^gamma - 1))  =  round(t)
    dR/dt = gamma / (2 sinh gamma) coth((1 / sigma^2 + 1 - 2 d) / 2),   d = |t - round(t)|

`distance_aware_assignment` is this construction step by step. What trains is `distance_aware_round`, the same in closed
form: it rounds, and multiplies gradients by the last line, without tensors for the neighbors. Weights are standardized
first, `(W - mean) / std` with constant statistics, and become `2 R / N - 1`; inputs have l = 0 and become `R / N`; the
layer learns an output scale. The clip has slope 1 inside and on both ends.

When to use it: 1 to 4 bits, starting from a trained float network, behind ReLUs. It costs a few element-wise operations
more than the straight-through estimator, one of them an exponential, and in every step the mean and spread of each
weight.

Recipe: recipes/quantize/daq_w1a1_resnet20_cifar10.yaml.

Chosen where the paper is silent, or otherwise than its public code: weights halfway between two levels go down, as
there; inputs go to the even level, as every engine rounds (at 1 bit these are the same). Weights are rounded in float32
whatever the network's type. At 8 bits they have 255 levels with a zero among them, so that codes fit a signed byte (the
paper stops at 4 bits, where codes are odd). `gamma` and `sigma` are those published for 1 bit, whatever the bits.
Ranges learn at a tenth of the weights' rate: at Adam's 1e-3 that is the paper's 1e-4. They are kept wider than 1e-8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
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


def distance_aware_assignment(t: Tensor, gamma: float, sigma: float) -> Tensor:
    """R(t) as the paper builds it, in its symbols; `t` counts levels and is clipped already.

    >>> distance_aware_assignment(torch.tensor([1.2, 1.5, 2.9]), gamma=2.0, sigma=1.0)
    tensor([1., 1., 3.])
    """
    f = t - t.detach().floor()
    q = torch.tensor([0.0, 1.0], dtype=t.dtype, device=t.device)
    nearest = (f.detach() > 0.5).to(t.dtype)
    kernel = torch.exp(-((q - nearest.unsqueeze(-1)) ** 2) / sigma**2)
    s = torch.exp(-(q + (1 - 2 * q) * f.unsqueeze(-1))) * kernel  # |f - q|, with a slope of 1 also on a level
    temperature = (gamma / (s[..., :1] - s[..., 1:]).abs()).detach()
    p = (temperature * s).softmax(-1)
    beyond = 1 / math.expm1(gamma)  # how far the levels move apart, so that the sum falls on the nearer one
    return t.detach().floor() + (p * (q + (2 * q - 1) * beyond)).sum(-1)


def distance_aware_gain(distance: Tensor, gamma: float, sigma: float) -> Tensor:
    """dR/dt at a distance, 0 to 1/2, from the nearest level. Changes `distance`.

    >>> distance_aware_gain(torch.tensor([0.0, 0.5]), gamma=2.0, sigma=1.0)
    tensor([0.3620, 0.5966])
    """
    constant = gamma * math.exp(-gamma) / -math.expm1(-2 * gamma)  # gamma / (2 sinh gamma), for any gamma
    grown = distance.mul_(-2).add_(1 / sigma**2 + 1).exp_()
    return grown.sub_(1).reciprocal_().mul_(2 * constant).add_(constant)  # 1 / tanh, in half its time


def distance_aware_round(
    x: Tensor, low: Tensor | None, high: Tensor, steps: int, gamma: float, sigma: float, centered: bool = False
) -> Tensor:
    """Level number k of `x` in an interval as `k / steps` in [0, 1], or centered as `2 k / steps - 1`.

    Args:
        x: values of any shape.
        low: lower end of the interval, a scalar, learned; none: 0.
        high: upper end, likewise.
        steps: number of levels less one, N.
        gamma: how hard the assignment is.
        sigma: width of the kernel that favors the nearer level; the gain is the larger at transitions the larger it is.
        centered: whether the values lie in [-1, 1] (weights); then halves go down, otherwise to even.

    >>> x = torch.tensor([0.0, 0.5], requires_grad=True)
    >>> y = distance_aware_round(x, None, torch.tensor(1.0), steps=1, gamma=2.0, sigma=1.0)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad
    ([0.0, 0.0], tensor([0.3620, 0.5966]))
    """
    rounded: Tensor = _DistanceAwareRound.apply(x, low, high, steps, gamma, sigma, centered)
    return rounded


class _DistanceAwareRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor | None, high: Tensor, steps: int, gamma: float, sigma: float, centered: bool
    ) -> Tensor:
        ctx.save_for_backward(x, low, high)
        ctx.steps, ctx.gamma, ctx.sigma, ctx.span = steps, gamma, sigma, 2.0 if centered else 1.0
        place = interval_place(x.to(torch.promote_types(x.dtype, high.dtype)), low, high, steps)
        code = centered_code(place, steps) if centered else place.round_().clamp_(0, steps)
        return code.mul_(1 / (largest_around_zero(steps) if centered else steps)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, high = ctx.saved_tensors
        x, low, high = x.detach(), None if low is None else low.detach(), high.detach()
        steps, slope = ctx.steps, ctx.span / interval_width(low, high)

        def compute(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            place = interval_place(x.to(torch.promote_types(x.dtype, high.dtype)), low, high, steps)
            gain = distance_aware_gain(place.round().sub_(place).abs_(), ctx.gamma, ctx.sigma)
            # One pass that is zero on or beyond two numbers. The ends of the interval belong to it.
            inside = torch.ops.aten.hardtanh_backward(grad.to(place.dtype), place, -HAIR, steps * (1 + HAIR))
            grad_place = inside.mul_(gain)
            everywhere = () if low is None else (grad_place.sum(),)
            return grad_place * slope, inner_product(grad_place, place), *everywhere

        grad_x, toward_high, *everywhere = in_blocks(compute, x, grads[0])
        grad_high = toward_high * (-slope / steps)
        grad_low = -slope * everywhere[0] - grad_high if everywhere else None
        return grad_x.to(x.dtype), grad_low, grad_high, None, None, None, None


def interval_width(low: Tensor | None, high: Tensor) -> Tensor:
    """`u - l`, kept positive."""
    return (high if low is None else high - low).clamp_min(SMALLEST_WIDTH)


def interval_place(x: Tensor, low: Tensor | None, high: Tensor, steps: int) -> Tensor:
    """Where a value lies, in levels, not clipped: t. A new tensor."""
    distance = interval_width(low, high) / steps
    return x / distance if low is None else (x - low).div_(distance)


def centered_code(place: Tensor, steps: int) -> Tensor:
    """The nearest level, halves down, as a code symmetric around 0. Changes `place`.

    >>> centered_code(torch.tensor([-1.0, 0.5, 1.5, 1.6, 9.0]), steps=3)
    tensor([-3., -3., -1.,  1.,  3.])
    """
    return codes_around_zero(place.sub_(0.5).ceil_().clamp_(0, steps), steps)


class DAQ(Quantizer):
    """Learned upper bound with distance-aware rounding, for a layer's non-negative input. Gives values in [0, 1].

    Args:
        bits: width of the integer, 1 to 8.
        gamma: how hard the assignment is; gradients shrink as it grows.
        sigma: width of the kernel that favors the nearer level; gradients near transitions grow with it.
        learning_rate_factor: of the bound's learning rate, against the weights'.
    """

    normalized = True

    def __init__(
        self, bits: int = 4, gamma: float = 2.0, sigma: float = 2.0, learning_rate_factor: float = 0.1
    ) -> None:
        super().__init__()
        _check(bits, gamma, sigma)
        self.bits, self.gamma, self.sigma, self.learning_rate_factor = bits, gamma, sigma, learning_rate_factor
        self.high = nn.Parameter(torch.ones(()))

    @property
    def steps(self) -> int:
        """Number of levels less one, N."""
        return int(2**self.bits) - 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """`u = 3 std(x)`, zeros counted."""
        self.high.copy_((3 * x.std(correction=int(x.numel() > 1))).clamp_min(SMALLEST_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return distance_aware_round(x, None, self.high, self.steps, self.gamma, self.sigma)

    def grid(self) -> Grid:
        zero = torch.zeros_like(self.high)
        return Grid(torch.full_like(zero, 1 / self.steps), zero, 0, self.steps)

    def encoder(self) -> Affine:
        distance = interval_width(None, self.high.detach()) / self.steps
        return Affine(distance, torch.zeros_like(distance))

    def own_rates(self) -> OwnRates:
        return OwnRates(self.learning_rate_factor, weight_decay=0.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, gamma={self.gamma:g}, sigma={self.sigma:g}"


class DAQWeight(DAQ):
    """Learned interval of standardized weights with distance-aware rounding. Gives values in [-1, 1].

    Arguments are those of `DAQ`; the paper's kernel is narrower for weights.
    """

    def __init__(
        self, bits: int = 4, gamma: float = 2.0, sigma: float = 1.0, learning_rate_factor: float = 0.1
    ) -> None:
        super().__init__(bits, gamma, sigma, learning_rate_factor)
        self.low = nn.Parameter(torch.tensor(-3.0))
        self.high = nn.Parameter(torch.tensor(3.0))

    @property
    def steps(self) -> int:
        """Number of levels less one, N."""
        return steps_around_zero(self.bits)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """`l = -3`, `u = 3`, in standard deviations, whatever the weights."""
        self.low.fill_(-3.0)
        self.high.fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        rounded = distance_aware_round(
            standardized(x.float()), self.low.float(), self.high.float(), self.steps, self.gamma, self.sigma, True
        )
        return rounded.to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        low, high = self.low.detach().float(), self.high.detach().float()
        return centered_code(interval_place(standardized(x.float()), low, high, self.steps), self.steps)

    def grid(self) -> Grid:
        return grid_around_zero(torch.full_like(self.high, 1 / largest_around_zero(self.steps)).detach(), self.steps)

    def encoder(self) -> Affine:
        """Of standardized weights, in units of a code: the nearest code of the grid to `(W - offset) / scale`."""
        width = interval_width(self.low, self.high).detach()
        return Affine(width / (2 * self.grid().high), (self.low + width / 2).detach())


def standardized(weight: Tensor) -> Tensor:
    """`(W - mean) / std` over the whole tensor; gradients take mean and spread for constants.

    >>> standardized(torch.tensor([0.0, 2.0, 4.0]))
    tensor([-1.,  0.,  1.])
    """
    constant = weight.detach()
    spread = constant.std(correction=min(1, constant.numel() - 1)).clamp_min(SMALLEST_WIDTH)
    return (weight - constant.mean()) / spread


def _check(bits: int, gamma: float, sigma: float) -> None:
    check_bits("DAQ", bits)
    for name, value in (("gamma", gamma), ("sigma", sigma)):
        if not value > 0:
            raise UserError(f"DAQ: {name} is {value}, but must be positive")
