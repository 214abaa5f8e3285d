"""LBT: low-bit training, gradients included, whose interval follows the few large gradients.

Kim, Lee, Jeon, Moon and Ham, "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients", ECCV
2024, arXiv:2407.12637.

With weights, inputs and gradients in low bits all three products of a layer's training step are integer products. Few
gradients are large, but they decide how a network learns; an interval that minimizes the error of all gradients clips
them. LBT keeps the error of the large ones (a share alpha of all) small. One inside the interval is off by at most half
a step, one outside by at most (1 - gamma) max|G|; the sum of both bounds is least where

    R(|G| > gamma max|G|) = alpha / (2^b - 1)

so after each step `gamma <- clip(gamma + 1e-3 sign(R - alpha / (2^b - 1)), 1e-3, 1)`; how gradients are rounded, the
page of `galago.quantize.gradient_quantizer` says. Weights and inputs have learned bounds u, one a tensor, with
N = 2^(b-1) - 1 codes each way (2^b - 1 upward for inputs that are never negative):

    v_hat = u / N round(clip(N v / u, -N, N)),   dv_hat/dv = 1 where |v| <= u,   dv_hat/du = v_hat/u - v/u 1[|v| <= u]

When to use it: to study, or prepare for, training in integers. On today's processors the rounding is simulated: each
gradient is read once more, and rounded, so training gets slower, not faster. What ships does not depend on the bits of
gradients. `LBT` and `LBTWeight` also serve by themselves; `AdaptiveInterval` serves any forward quantizers, or none. In
small layers, where less than one element a batch is to be clipped, gamma hovers near 1: min-max in effect.

Recipe: recipes/quantize/lbt_w4a4g4_resnet20_cifar10.yaml (recipes/quantize/paper has the paper's schedule).

Chosen where the paper is silent, or differently from the public code: gamma starts, as in the public code, by narrowing
from 1 until a slow average of R passes the condition, but in a side trip on the first batch, after which that batch is
trained on. The public code's weight scale may change its sign and negate the layer; here the bound's absolute value
counts on both sides. There is one optimizer here (paper: Adam at 1e-5 for bounds, SGD at 0.1 for weights): at a
thousandth of an SGD's 0.1, bounds move about as far in a step as by Adam at 1e-5. They do not decay. Gradients that are
all zero, or not finite, leave gamma alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.quantize.blocks import in_blocks, inner_product
from galago.quantize.gradient_quantizer import OFF, GradientQuantizer
from galago.quantize.quantizer import Grid, OwnRates, Quantizer, check_bits, integer_range

SMALLEST_BOUND = 1e-12
SMALLEST_GAMMA = 1e-3
SLOWNESS = 1e-3  # weight of the newest number in the average that gamma starts from
HAIR = 1e-6  # of the interval: what a division may be off at its ends
HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |x| for a standard normal x


def learned_bound(v: Tensor, bound: Tensor, low: int, high: int) -> Tensor:
    """Rounds to multiples of `bound / high` between `low` and `high` of them; differentiable in both tensors.

    >>> bound = torch.tensor(3.0, requires_grad=True)
    >>> learned_bound(torch.tensor([1.2, 9.0]), bound, -3, 3)
    tensor([1., 3.], grad_fn=<_LearnedBoundBackward>)
    >>> learned_bound(torch.tensor([1.2, 9.0]), bound, -3, 3).sum().backward()
    >>> bound.grad  # (1 - 1.2) / 3 + 1
    tensor(0.9333)
    """
    rounded: Tensor = _LearnedBound.apply(v, bound, low, high)
    return rounded


class _LearnedBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, bound: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(v, bound)
        ctx.low, ctx.high = low, high
        step = bound / high
        wide = v.to(torch.promote_types(v.dtype, bound.dtype))
        return (wide / step).round_().clamp_(low, high).mul_(step).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, bound = (saved.detach() for saved in ctx.saved_tensors)
        low, high, step = ctx.low, ctx.high, bound / ctx.high

        def compute(v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            place = v.to(torch.promote_types(v.dtype, bound.dtype)) / step
            grad = grad.to(place.dtype)
            # One pass that is zero on or beyond two numbers. The ends of the interval belong to it.
            inside = torch.ops.aten.hardtanh_backward(grad, place, low - high * HAIR, high * (1 + HAIR))
            rounded = place.round().clamp_(low, high)
            return inside, inner_product(grad, rounded) - inner_product(inside, place)

        grad_v, grad_codes = in_blocks(compute, v, grads[0])
        return grad_v.to(v.dtype), grad_codes / high, None, None


class LBT(Quantizer):
    """Learned bound for a layer's input.

    Args:
        bits: width of the integer, 1 to 8.
        signed: whether negative values occur; none: decided by the first batch.
        learning_rate_factor: of the bound's learning rate, against the weights'.
    """

    def __init__(self, bits: int = 4, signed: bool | None = None, learning_rate_factor: float = 1e-3) -> None:
        super().__init__()
        check_bits("LBT", bits, lowest=2 if signed else 1)
        self.bits, self.signed, self.learning_rate_factor = bits, signed, learning_rate_factor
        self.bound = nn.Parameter(torch.ones(()))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, signed=bool(self.signed), narrow=bool(self.signed))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """`u = 3 std(x)`; for unsigned values over `sqrt(1 - 2/pi)`, as if they were half of a normal variable."""
        if self.signed is None:
            self.signed = bool((x < 0).any())
        check_bits("LBT", self.bits, lowest=2 if self.signed else 1)
        bound = 3 * x.std(correction=int(x.numel() > 1)) / (1 if self.signed else HALF_NORMAL)
        self.bound.copy_(bound.clamp_min(SMALLEST_BOUND))  # at 0 its size would have no gradient

    def positive_bound(self) -> Tensor:
        """The size of the bound, whatever its sign."""
        return self.bound.abs() + SMALLEST_BOUND

    def forward(self, x: Tensor) -> Tensor:
        return learned_bound(x, self.positive_bound(), *self.limits)

    def grid(self) -> Grid:
        low, high = self.limits
        return Grid(self.positive_bound().detach() / high, torch.zeros_like(self.bound), low, high)

    def own_rates(self) -> OwnRates:
        return OwnRates(self.learning_rate_factor, weight_decay=0.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class LBTWeight(LBT):
    """Learned bound for weights, one a tensor, symmetric.

    Args:
        bits: width of the integer, 2 to 8.
        learning_rate_factor: of the bound's learning rate, against the weights'.
    """

    def __init__(self, bits: int = 4, learning_rate_factor: float = 1e-3) -> None:
        super().__init__(bits, signed=True, learning_rate_factor=learning_rate_factor)


class AdaptiveInterval(GradientQuantizer):
    """An interval for gradients that keeps the error of the large ones small (the paper's).

    Args:
        bits: width of the integer, 2 to 8; 32 leaves gradients as they are.
        alpha: the share of all gradients that count as large (paper: by grid search; 0.001 for ResNet-20).
        rate: by how much gamma moves in a step.
    """

    def __init__(self, bits: int = 4, alpha: float = 1e-3, rate: float = 1e-3) -> None:
        super().__init__(bits)
        if not 0 < alpha < 1:
            raise UserError(f"AdaptiveInterval: alpha is {alpha}, but must be a share between 0 and 1, usually 0.001")
        if not 0 < rate <= 0.1:
            raise UserError(f"AdaptiveInterval: rate is {rate}, but must be above 0 and at most 0.1, usually 0.001")
        self.alpha, self.rate = alpha, rate

    @property
    def target(self) -> float:
        """The share of elements that is to be clipped: the paper's optimal condition."""
        return float(self.alpha / (2**self.bits - 1))

    @torch.no_grad()
    def start(self, gradient: Tensor) -> None:
        if self.bits != OFF and gradient.isfinite().all() and gradient.any():
            self.gamma.fill_(first_gamma(gradient, self.target, self.rate))

    def follow(self, excess: Tensor) -> None:
        self.gamma.add_(excess.sign(), alpha=self.rate).clamp_(SMALLEST_GAMMA, 1.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, alpha={self.alpha}"


class FixedInterval(GradientQuantizer):
    """An interval for gradients that is the same share of the largest one throughout; all of it is min-max.

    Args:
        bits: width of the integer, 2 to 8; 32 leaves gradients as they are.
        share: of the largest gradient, above 0 and at most 1.
    """

    def __init__(self, bits: int = 4, share: float = 1.0) -> None:
        super().__init__(bits)
        if not 0 < share <= 1:
            raise UserError(f"FixedInterval: share is {share}, but must be above 0 and at most 1 (1 is min-max)")
        self.share = share
        self.gamma.fill_(share)

    def follow(self, excess: Tensor) -> None:
        """Stays where it is."""


def first_gamma(gradient: Tensor, target: float, rate: float = 1e-3) -> float:
    """Where gamma starts: it narrows from 1 until a slow average of the clipped share passes `target`.

    Args:
        gradient: the first one, not all zero.
        target: share of elements that is to be clipped.
        rate: by how much gamma moves in each round.
    """
    size = gradient.abs().flatten().to(torch.promote_types(gradient.dtype, torch.float32))
    rounds = math.ceil(1 / rate)
    gammas = torch.linspace(1 - rounds * rate, 1, rounds + 1, dtype=size.dtype, device=size.device)  # rising
    beyond = torch.bucketize(size, gammas * size.max())  # how many of these bounds an element exceeds
    clipped = torch.bincount(beyond, minlength=rounds + 2).flip(0).cumsum(0) / size.numel()  # widest interval first
    average = 0.0
    for done, share in enumerate(clipped[:rounds].tolist()):
        average += SLOWNESS * (share - average)
        if average > target:
            return min(1 - done * rate + rate, 1.0)
    return SMALLEST_GAMMA
