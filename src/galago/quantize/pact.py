"""PACT: parameterized clipping activation, with SAWB weights.

Choi, Wang, Venkataramani, Chuang, Srinivasan and Gopalakrishnan, "PACT: Parameterized Clipping Activation for Quantized
Neural Networks", 2018, arXiv:1805.06085; weights: Choi et al., "Bridging the Accuracy Gap for 2-bit Quantized Neural
Networks", 2018, arXiv:1807.06964.

A ReLU has no upper end, so rounding it needs one. PACT makes the end a parameter: values beyond it pull it outward,
weight decay pulls it inward, and between the two it settles. SAWB places the ends of a weight tensor where the rounding
error is about smallest, as told by two of its moments.

    inputs   y = clip(x, 0, alpha),  y_hat = round(y (2^b - 1) / alpha) alpha / (2^b - 1)
             dy_hat/dx = 1 where 0 < x < alpha, else 0;   dy_hat/dalpha = 1 where x >= alpha, else 0
    weights  alpha_w = c1 sqrt(mean w^2) - c2 mean|w|
             w_hat = alpha_w (2 k - N) / N,  k = clip(round(N (w / (2 alpha_w) + 1/2)), 0, N),  N = 2^b - 1

When to use it: a simple reference at 2 to 8 bits behind ReLU; `LSQ` is usually better. Inputs cost a few element-wise
operations and one sum a tensor, weights two means. PACT's authors pair it with `DoReFaWeight` first, later with SAWB;
both fit. On an input that is negative too, such as a normalized image, use another (`edge_input`).

Recipe: recipes/quantize/pact_w4a4_resnet20_cifar10.yaml.

Chosen where the papers are silent: alpha decays like the weights (without decay it only ever grows where clipping
hurts), at the common learning rate, and is kept above 1e-8. It begins at 8, as published (8 to 10), which suits
training from scratch; `initial: null` begins where rounding the first batch loses least, which suits trained networks.
SAWB's coefficients are published for 2 to 4 bits (recalled, and checked: within 2 % of the smallest squared error for
normal and Laplace weights); at 1 bit `alpha_w = mean|w|` is exact, and from 5 bits on ours give the best ends for
normal and for Laplace weights. The end is kept between the mean and the largest magnitude. At 8 bits N is 254, so that
codes fit a signed byte. The weights' gradient is straight-through, also for clipped ones, which would never come back
otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.quantize.blocks import in_blocks, inner_product
from galago.quantize.quantizer import (
    Grid,
    OwnRates,
    Quantizer,
    check_bits,
    grid_around_zero,
    largest_around_zero,
    steps_around_zero,
)

SMALLEST_END = 1e-8
SAMPLE = 2**15  # values that the first end is chosen on
SHRINKS = 64  # ends tried: from the largest value down to 1/234 of it

# c1 and c2 by bits: 2 to 4 published, others as the module's page says.
COEFFICIENTS = {
    1: (0.0, -1.0),
    2: (3.12, 2.064),
    3: (7.509, 6.892),
    4: (12.68, 12.80),
    5: (15.25, 15.46),
    6: (19.74, 20.65),
    7: (23.71, 25.26),
    8: (25.48, 27.22),
}


def learned_clip(x: Tensor, alpha: Tensor, steps: int) -> Tensor:
    """Clips to [0, alpha] and rounds to multiples of `alpha / steps`; differentiable in both tensors.

    Args:
        x: values of any shape.
        alpha: upper end, a scalar.
        steps: number of levels less one, 2^b - 1.

    >>> alpha = torch.tensor(1.5, requires_grad=True)
    >>> y = learned_clip(torch.tensor([-1.0, 0.6, 4.0]), alpha, 3)
    >>> y.sum().backward()
    >>> y.tolist(), alpha.grad  # one value of three is clipped from above
    ([0.0, 0.5, 1.5], tensor(1.))
    """
    rounded: Tensor = _LearnedClip.apply(x, alpha, steps)
    return rounded


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        distance = alpha.clamp_min(SMALLEST_END) / steps
        wide = x.to(torch.promote_types(x.dtype, alpha.dtype))
        return (wide / distance).round_().clamp_(0, steps).mul_(distance).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = (saved.detach() for saved in ctx.saved_tensors)

        def compute(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            place = x.to(torch.promote_types(x.dtype, alpha.dtype)) / alpha.clamp_min(SMALLEST_END)
            grad = grad.to(place.dtype)
            # One pass that is zero on or beyond two numbers; x / alpha reaches 1 exactly where x reaches alpha.
            grad_x = torch.ops.aten.hardtanh_backward(grad, place, 0, 1)
            return grad_x, inner_product(grad, place.clamp_(0, 1).floor_())

        grad_x, grad_alpha = in_blocks(compute, x, grads[0])
        return grad_x.to(x.dtype), grad_alpha, None


class PACT(Quantizer):
    """Learned clipping for what comes out of a ReLU: a layer's input.

    Args:
        bits: width of the integer, 1 to 8.
        initial: alpha to begin with; null: the one that loses least in rounding the first batch.
        weight_decay: of alpha; null: that of the weights, as in the paper.
    """

    def __init__(self, bits: int = 4, initial: float | None = 8.0, weight_decay: float | None = None) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise UserError(f"PACT: bits is {bits}, but must be 1 to 8")
        if initial is not None and initial <= 0:
            raise UserError(f"PACT: initial is {initial}, but must be positive, or null to read it off the first batch")
        self.bits, self.initial, self.weight_decay = bits, initial, weight_decay
        self.alpha = nn.Parameter(torch.tensor(1.0 if initial is None else float(initial)))

    @property
    def steps(self) -> int:
        """Number of levels less one."""
        return int(2**self.bits) - 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Alpha as given, or else the one that loses least in rounding `x`."""
        self.alpha.copy_(least_squares_end(x, self.steps) if self.initial is None else torch.tensor(self.initial))

    def forward(self, x: Tensor) -> Tensor:
        return learned_clip(x, self.alpha, self.steps)

    def grid(self) -> Grid:
        distance = self.alpha.detach().clamp_min(SMALLEST_END) / self.steps
        return Grid(distance, torch.zeros_like(distance), 0, self.steps)

    def own_rates(self) -> OwnRates:
        """Alpha decays: that is what keeps it from growing."""
        return OwnRates(weight_decay=self.weight_decay)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def least_squares_end(x: Tensor, steps: int) -> Tensor:
    """The upper end whose clipping and rounding changes a sample of `x` least on average; a scalar."""
    # An odd stride, so that the sample does not come from a few columns of the images only.
    sample = x.reshape(-1)[:: max(1, x.numel() // SAMPLE) | 1].clamp_min(0)
    shrunk = torch.exp2(-torch.arange(SHRINKS, device=x.device, dtype=x.dtype) / 8)
    ends = (x.max() * shrunk).clamp_min(SMALLEST_END)
    errors = [(learned_clip(sample, end, steps) - sample).square().mean() for end in ends]
    return ends[torch.stack(errors).argmin()]


class SAWBWeight(Quantizer):
    """Weights rounded between ends that follow from their moments (statistics-aware weight binning); nothing learned.

    Args:
        bits: width of the integer, 1 to 8.
    """

    scale: Tensor

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        check_bits("SAWBWeight", bits)
        self.bits = bits
        self.register_buffer("scale", torch.ones(()))

    @property
    def steps(self) -> int:
        """Number of levels less one, N."""
        return steps_around_zero(self.bits)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Takes the ends that these weights have."""
        self._measured(x)

    def forward(self, x: Tensor) -> Tensor:
        scale = self._measured(x)
        wide = x.to(torch.promote_types(x.dtype, scale.dtype))
        rounded: Tensor = _Straight.apply(x, (nearest_code(wide, scale, self.steps) * scale).to(x.dtype))
        return rounded

    def codes(self, x: Tensor) -> Tensor:
        return nearest_code(x.detach().float(), self._measured(x), self.steps)

    def grid(self) -> Grid:
        return grid_around_zero(self.scale.clone(), self.steps)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def _measured(self, weight: Tensor) -> Tensor:
        """What one code counts for these weights, which the grid then keeps."""
        end = statistics_aware_end(weight.detach().float(), self.bits)
        scale = end / largest_around_zero(self.steps)
        self.scale.copy_(scale)
        return scale


def statistics_aware_end(weight: Tensor, bits: int) -> Tensor:
    """`alpha_w = c1 sqrt(mean w^2) - c2 mean|w|`, kept between the mean and the largest magnitude; a scalar.

    >>> statistics_aware_end(torch.tensor([-1.0, 1.0, 3.0]), bits=1)
    tensor(1.6667)
    """
    first, second = COEFFICIENTS[bits]
    size = weight.abs()
    end = first * weight.square().mean().sqrt() - second * size.mean()
    return torch.minimum(torch.maximum(end, size.mean()), size.max()).clamp_min(SMALLEST_END)


def nearest_code(weight: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Codes symmetric around 0: the nearest odd integer up to `steps` for odd ones, the nearest integer for even."""
    if steps % 2 == 0:
        return (weight / scale).round().clamp(-steps // 2, steps // 2)
    return (weight / (2 * scale) + steps / 2).round().clamp(0, steps).mul(2).sub(steps)


class _Straight(torch.autograd.Function):
    """The second tensor, with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
