"""DoReFa: low-bitwidth weights squeezed by tanh, inputs clipped at one.

Zhou, Wu, Ni, Zhou, Wen and Zou, "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients", 2016, arXiv:1606.06160.

Nothing is learned. Weights of any size are brought into [-1, 1] by tanh and their largest magnitude and get evenly
spaced levels there; one bit is their sign times their mean size. Inputs are clipped to [0, 1].

    quantize_k(r) = round((2^k - 1) r) / (2^k - 1)
    weights  w' = tanh(w) / (2 max|tanh(w)|) + 1/2,  w_hat = 2 quantize_k(w') - 1;   k = 1: w_hat = mean|w| sign(w)
    inputs   x_hat = quantize_k(clip(x, 0, 1)),  dx_hat/dx = 1 where 0 < x < 1, else 0

When to use it: as the reference that most papers compare with, at 1 to 4 bits; `LSQ` and `EWGS` are better. It is also
the simplest way to one-bit weights. It costs a few element-wise operations. Inputs above 1 are lost, so a network that
was trained in float has to be trained on for some epochs.

Recipe: recipes/quantize/dorefa_w4a4_resnet20_cifar10.yaml.

The gradient of weights goes through tanh and through the maximum (`detach_max` leaves the latter out); at one bit it
is straight-through and the mean is a constant. The gradient quantizer of the paper is not part of this file.

Design choices: w_hat has no size of its own, so the layer learns an output scale as with `EWGSWeight`, which begins
where the output is as large as in float; in front of a BatchNorm, as in the paper, it changes nothing that the network
can express. It learns at 1/100 of the weights' rate and does not decay. At 8 bits weights have 255 levels with a zero
among them, so that codes fit a signed byte. The sign of 0 is +1. First and last layers are float in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galago.quantize.blocks import in_blocks, kept_inside
from galago.quantize.quantizer import (
    Grid,
    OwnRates,
    Quantizer,
    check_bits,
    codes_around_zero,
    grid_around_zero,
    largest_around_zero,
    steps_around_zero,
)

SMALLEST_SIZE = 1e-8


def clipped_round(x: Tensor, bound: Tensor, steps: int) -> Tensor:
    """Clips to [0, bound] and rounds to multiples of `bound / steps`; gradient 1 strictly inside.

    Args:
        x: values of any shape.
        bound: upper end, a positive scalar; DoReFa's is 1. Not learned.
        steps: number of levels less one, 2^k - 1.

    >>> clipped_round(torch.tensor([-1.0, 0.3, 0.6, 7.0]), torch.tensor(1.0), 2)
    tensor([0.0000, 0.5000, 0.5000, 1.0000])
    """
    rounded: Tensor = _ClippedRound.apply(x, bound, steps)
    return rounded


class _ClippedRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(x, bound)
        distance = bound / steps
        wide = x.to(torch.promote_types(x.dtype, bound.dtype))
        return (wide / distance).round_().clamp_(0, steps).mul_(distance).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bound = (saved.detach() for saved in ctx.saved_tensors)

        def compute(x: Tensor, grad: Tensor) -> tuple[Tensor]:
            place = x.to(torch.promote_types(x.dtype, bound.dtype)) / bound
            return (kept_inside(grad.to(place.dtype), place, 0, 1),)

        (grad_x,) = in_blocks(compute, x, grads[0])
        return grad_x.to(x.dtype), None, None


class DoReFa(Quantizer):
    """Clipping at 1, for a layer's input behind a ReLU.

    Args:
        bits: width of the integer, 1 to 8.
    """

    bound: Tensor

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        check_bits("DoReFa", bits)
        self.bits = bits
        self.register_buffer("bound", torch.ones(()))  # a constant, but it has to be where the inputs are

    @property
    def steps(self) -> int:
        """Number of levels less one."""
        return int(2**self.bits) - 1

    def initialize(self, x: Tensor) -> None:
        """Nothing: the range is [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return clipped_round(x, self.bound, self.steps)

    def grid(self) -> Grid:
        return Grid(self.bound / self.steps, torch.zeros_like(self.bound), 0, self.steps)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def squeezed(weight: Tensor, detach_max: bool = False) -> Tensor:
    """`w' = tanh(w) / (2 max|tanh(w)|) + 1/2`, in [0, 1]; differentiable, through the maximum unless detached.

    >>> squeezed(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    curved = weight.tanh()
    largest = curved.abs().max().clamp_min(SMALLEST_SIZE)
    return curved / (2 * (largest.detach() if detach_max else largest)) + 0.5


def centered_code(place: Tensor, steps: int) -> Tensor:
    """Places in [0, 1] as codes around 0, of the level k = round(N place)."""
    return codes_around_zero((place * steps).round(), steps)


class _Rounded(torch.autograd.Function):
    """Places in [0, 1] as `scale * centered_code`, from -1 to 1; the slope is 2 everywhere."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, scale: Tensor, steps: int) -> Tensor:
        return centered_code(place, steps) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return 2 * grads[0], None, None


class _Signed(torch.autograd.Function):
    """`size * sign(w)`, where 0 counts as positive; straight-through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, size: Tensor) -> Tensor:
        return sign_code(weight) * size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def sign_code(weight: Tensor) -> Tensor:
    """-1 or 1; 1 for 0."""
    return (weight >= 0).to(weight.dtype).mul(2).sub(1)


class DoReFaWeight(Quantizer):
    """Weights squeezed into [-1, 1] by tanh; at one bit, their sign times their mean size.

    Args:
        bits: width of the integer, 1 to 8.
        detach_max: take the largest magnitude for a constant in the gradient.
    """

    normalized = True
    scale: Tensor

    def __init__(self, bits: int = 4, detach_max: bool = False) -> None:
        super().__init__()
        check_bits("DoReFa", bits)
        self.bits, self.detach_max = bits, detach_max
        self.register_buffer("scale", torch.ones(()))

    @property
    def steps(self) -> int:
        """Number of levels less one, N."""
        return steps_around_zero(self.bits)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Takes the size that these weights have."""
        self._measured(x)

    def forward(self, x: Tensor) -> Tensor:
        wide, scale = x.to(torch.promote_types(x.dtype, torch.float32)), self._measured(x)
        if self.bits == 1:
            rounded: Tensor = _Signed.apply(wide, scale)
        else:
            rounded = _Rounded.apply(squeezed(wide, self.detach_max), scale, self.steps)
        return rounded.to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        weight = x.detach().float()
        self._measured(weight)
        return sign_code(weight) if self.bits == 1 else centered_code(squeezed(weight), self.steps)

    def grid(self) -> Grid:
        return grid_around_zero(self.scale.clone(), self.steps)

    def own_rates(self) -> OwnRates:
        """Of the layer's output scale; there is nothing else to learn."""
        return OwnRates(learning_rate_factor=0.01, weight_decay=0.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, detach_max={self.detach_max}"

    def _measured(self, weight: Tensor) -> Tensor:
        """What one code counts: a constant, at one bit the mean size of these weights. The grid keeps it."""
        size = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).abs().mean()
        one_bit = size.clamp_min(SMALLEST_SIZE)
        scale = one_bit if self.bits == 1 else torch.ones_like(size) / largest_around_zero(self.steps)
        self.scale.copy_(scale)
        return scale
