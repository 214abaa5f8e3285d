"""LSQ+: learned step size with a learned offset.

Bhalgat, Lee, Nagel, Blankevoort and Kwak, "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", CVPR 2020 workshops, arXiv:2004.09576.

Swish and its kin are a little negative: an unsigned LSQ cuts that off, a signed one spends half of its levels on it.
LSQ+ learns where the levels begin as well as how far apart they are. Weights are LSQ's, with another first step.

    v_bar = round(clip((v - beta) / s, n, p)),   v_hat = s v_bar + beta
    dv_hat/ds = v_bar - (v - beta) / s  inside;  n below;  p above
    dv_hat/dbeta = 0  inside;  1  outside;   dv_hat/dv = 1  inside;  0  outside
    both sums are multiplied by 1 / sqrt(N p)

When to use it: 2 to 4 bits behind activations that are negative in part (Swish, hard Swish, GELU, leaky ReLU); behind
a ReLU it is LSQ with a little more freedom. It costs what LSQ costs and one more sum a tensor.

Recipe: recipes/quantize/lsq_plus_w4a4_resnet20_cifar10.yaml.

Design choice, for export: in the network beta is rounded to whole steps, `beta = -s z` with a code z between n and p,
straight-through, so that zero is a level. With beta between two levels, zero padding would stand for no code, and no
constant could make up for it at the borders of an image; so there is no switch for that. The gradients are the paper's
at the rounded beta; where z is held at n or p, beta keeps only the gradient that leads back. `rounded_from_offset`
itself also takes beta as it is. With beta = 0 it is LSQ bit for bit.

Chosen where the paper is silent: inside means strictly inside, as in LSQ, and `N` counts the features of one sample.
Step and offset begin where the mean squared error over some thousand values of the first batches is smallest, of all
ranges whose ends are those of the batch shrunk by powers of 2^(1/6). Weights have a step for each output channel;
`per_channel: false` is the paper's one step a tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from galago.quantize.blocks import extremes, in_blocks, inner_product
from galago.quantize.learned_step import SMALLEST_STEP, learned_step
from galago.quantize.quantizer import Grid, Quantizer, along, check_bits, integer_range

SAMPLE = 2**13  # values that the first range is chosen on
SHRINKS = 32  # ends tried on each side: down to 1/36 of what the batch spans


def rounded_from_offset(
    v: Tensor,
    step: Tensor,
    offset: Tensor,
    low: int,
    high: int,
    gradient_scale: float = 1.0,
    whole: bool = False,
) -> Tensor:
    """Rounds to `offset + k step`, k from `low` to `high`; differentiable in all three tensors.

    Args:
        v: values of any shape.
        step: s, a scalar.
        offset: beta, a scalar.
        low: smallest code, n.
        high: largest code, p.
        gradient_scale: what the gradients of step and offset are multiplied by.
        whole: round the offset to whole steps, so that zero is among the values.

    >>> v, step, offset = torch.tensor([-0.4, 0.2, 9.0]), torch.tensor(0.5), torch.tensor(-0.3)
    >>> rounded_from_offset(v, step, offset, 0, 3)
    tensor([-0.3000,  0.2000,  1.2000])
    >>> rounded_from_offset(v, step, offset, 0, 3, whole=True)
    tensor([-0.5000,  0.0000,  1.0000])
    """
    rounded: Tensor = _RoundedFromOffset.apply(v, step, offset, low, high, gradient_scale, whole)
    return rounded


def zero_code(step: Tensor, offset: Tensor, low: int, high: int, whole: bool = True) -> Tensor:
    """`-beta / s`, the code that stands for zero; whole and between `low` and `high` if asked for."""
    code = -offset / step.clamp_min(SMALLEST_STEP)
    return code.round().clamp(low, high) if whole else code


class _RoundedFromOffset(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, step: Tensor, offset: Tensor, low: int, high: int, gradient_scale: float, whole: bool
    ) -> Tensor:
        ctx.save_for_backward(v, step, offset)
        ctx.low, ctx.high, ctx.gradient_scale, ctx.whole = low, high, gradient_scale, whole
        positive, zero = step.clamp_min(SMALLEST_STEP), zero_code(step, offset, low, high, whole)
        wide = v.to(torch.promote_types(v.dtype, step.dtype))
        codes = level_codes(wide / positive, zero).clamp_(low, high)
        return codes.sub_(zero).mul_(positive).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, step, offset = (saved.detach() for saved in ctx.saved_tensors)
        low, high = ctx.low, ctx.high
        positive, zero = step.clamp_min(SMALLEST_STEP), zero_code(step, offset, low, high, ctx.whole)

        def compute(v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scaled = v.to(torch.promote_types(v.dtype, step.dtype)) / positive
            codes = level_codes(scaled, zero).clamp_(low, high)
            grad, place = grad.to(scaled.dtype), scaled.add_(zero)
            # One pass that is zero on or beyond two numbers: strictly inside.
            grad_v = torch.ops.aten.hardtanh_backward(grad, place, low, high)
            return grad_v, inner_product(grad, codes) - inner_product(grad_v, place), grad.sum() - grad_v.sum()

        grad_v, grad_step, grad_offset = in_blocks(compute, v, grads[0])
        if ctx.whole:
            grad_offset = leading_back(grad_offset, -offset / positive, low, high)
        scale = ctx.gradient_scale
        return grad_v.to(v.dtype), grad_step * scale, grad_offset * scale, None, None, None, None


def level_codes(scaled: Tensor, zero: Tensor) -> Tensor:
    """`round(v / s + z)`, where a whole z is added after rounding, as engines do. A new tensor."""
    nearest = zero.round()
    return (scaled + (zero - nearest)).round_().add_(nearest)


def leading_back(grad: Tensor, code: Tensor, low: int, high: int) -> Tensor:
    """An offset's gradient, without what would move a zero beyond the codes even farther away."""
    inward = torch.where(code < low, grad.clamp_min(0), grad)  # descent along it lowers beta and so raises the code
    return torch.where(code > high, inward.clamp_max(0), inward)


class LSQPlus(Quantizer):
    """Learned step size and offset for what flows through a network: a layer's input, a residual stream.

    Args:
        bits: width of the integer, 1 to 8.
        signed: count codes from -2^(bits - 1) rather than from 0. The offset reaches the same values either way; a
            value below the range then moves the step too.
    """

    def __init__(self, bits: int = 4, signed: bool = False) -> None:
        super().__init__()
        check_bits("LSQPlus", bits, lowest=2 if signed else 1)
        self.bits, self.signed = bits, signed
        self.step = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, self.signed)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets step and offset to what loses least in rounding `x`."""
        step, offset = least_squares_range(x, *self.limits)
        self.step.copy_(step)
        self.offset.copy_(offset)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.limits
        scale = 1 / math.sqrt(math.prod(x.shape[1:]) * high)
        return rounded_from_offset(x, self.step, self.offset, low, high, scale, whole=True)

    def grid(self) -> Grid:
        step, offset = self.step.detach(), self.offset.detach()
        return Grid(step.clamp_min(SMALLEST_STEP), zero_code(step, offset, *self.limits), *self.limits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


def least_squares_range(x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Step and offset whose rounding, with zero among its values, changes a sample of `x` least on average."""
    smallest, largest = extremes(x)
    # An odd stride, so that the sample does not come from a few columns of the images only.
    sample = x.reshape(-1)[:: max(1, x.numel() // SAMPLE) | 1]
    shrunk = torch.exp2(-torch.arange(SHRINKS, device=x.device, dtype=x.dtype) / 6)
    tops = largest.clamp_min(0) * shrunk
    found = []
    for bottom in sorted(set((smallest.clamp_max(0) * shrunk).tolist())):
        step = ((tops - bottom) / (high - low)).clamp_min(SMALLEST_STEP)
        offset = bottom - low * step
        zero = zero_code(step, offset, low, high)[:, None]
        rounded = (level_codes(sample / step[:, None], zero).clamp_(low, high) - zero) * step[:, None]
        found.append(torch.stack([(rounded - sample).square().mean(1), step, offset]))
    errors, steps, offsets = torch.cat(found, 1)
    best = errors.argmin()
    return steps[best], offsets[best]


class LSQPlusWeight(Quantizer):
    """LSQ for weights, beginning at the step that reaches three standard deviations.

    Args:
        bits: width of the integer, 2 to 8.
        per_channel: one step for each slice along the weight's first axis.
    """

    def __init__(self, bits: int = 4, per_channel: bool = True) -> None:
        super().__init__()
        check_bits("LSQPlus", bits, lowest=2)
        self.bits, self.per_channel = bits, per_channel
        self.step = nn.Parameter(torch.ones(()))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, signed=True, narrow=self.bits == 8)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """`s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)`, for each output channel or for all."""
        rows = x.flatten(1) if self.per_channel else x.reshape(1, -1)
        reach = rows.mean(1).abs() + 3 * rows.std(1, correction=int(rows.shape[1] > 1))
        steps = (reach / 2 ** (self.bits - 1)).clamp_min(SMALLEST_STEP)
        self.step.data = steps if self.per_channel else steps[0]

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.limits
        weights = math.prod(x.shape[1:] if self.per_channel else x.shape)
        return learned_step(x, along(self.step, x, 0), low, high, 1 / math.sqrt(weights * high))

    def grid(self) -> Grid:
        step = self.step.detach().clamp_min(SMALLEST_STEP)
        return Grid(step, torch.zeros_like(step), *self.limits, axis=0 if self.per_channel else None)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}"
