"""Rounding to multiples of a step that learns: the gradients of LSQ, which several quantizers share.

A value's gradient is 1 strictly between the outermost levels and 0 elsewhere; the step's is the sum of the rounding
errors, in steps, inside, and of the outermost codes beyond (`galago.quantize.lsq` gives formulas and paper).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galago.quantize.blocks import in_blocks, inner_product

SMALLEST_STEP = 1e-8


def learned_step(v: Tensor, step: Tensor, low: int, high: int, gradient_scale: float = 1.0) -> Tensor:
    """Rounds to multiples of `step` between `low` and `high` of them; differentiable in both tensors.

    Args:
        v: values of any shape.
        step: a scalar, or a tensor that broadcasts against `v` with one element a slice along the first axis.
        low: smallest code, -Q_n.
        high: largest code, Q_p.
        gradient_scale: what the step's gradient is multiplied by.

    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> learned_step(torch.tensor([0.6, 9.0]), step, 0, 3)
    tensor([0.5000, 1.5000], grad_fn=<_LearnedStepBackward>)
    >>> learned_step(torch.tensor([0.6, 9.0]), step, 0, 3).sum().backward()
    >>> step.grad  # (1 - 0.6 / 0.5) + 3
    tensor(2.8000)
    """
    rounded: Tensor = _LearnedStep.apply(v, step, low, high, gradient_scale)
    return rounded


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(v, step)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        positive = step.clamp_min(SMALLEST_STEP)
        wide = v.to(torch.promote_types(v.dtype, step.dtype))
        return (wide / positive).round_().clamp_(low, high).mul_(positive).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, step = (saved.detach() for saved in ctx.saved_tensors)

        def compute(v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            return gradients(v, grad, step, ctx.low, ctx.high)

        grad_v, grad_step = in_blocks(compute, v, grads[0]) if step.ndim == 0 else compute(v, grads[0])
        return grad_v.to(v.dtype), grad_step * ctx.gradient_scale, None, None, None


def gradients(v: Tensor, grad: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """What `grad`, the loss's gradient in the rounded values, means for `v` and for `step`, before scaling."""
    scaled = v.to(torch.promote_types(v.dtype, step.dtype)) / step.clamp_min(SMALLEST_STEP)
    grad = grad.to(scaled.dtype)
    # One pass that is zero where `scaled` is on or beyond a bound: the paper's strict inequalities.
    grad_v = torch.ops.aten.hardtanh_backward(grad, scaled, low, high)
    rounded = scaled.round().clamp_(low, high)
    if step.ndim == 0:
        return grad_v, inner_product(grad, rounded) - inner_product(grad_v, scaled)
    return grad_v, (grad * rounded - grad_v * scaled).sum_to_size(step.shape)
