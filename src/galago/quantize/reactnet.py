"""AdamBNN / ReActNet: binary networks, where weights and inputs are signs.

Liu, Shen, Li, Helwegen, Huang and Cheng, "How Do Adam and Training Strategies Help BNNs Optimization?", ICML 2021,
arXiv:2106.11309; Liu, Shen, Savvides and Cheng, "ReActNet: Towards Precise Binary Neural Network with Generalized
Activation Functions", ECCV 2020, arXiv:2003.03488.

A layer multiplies signs with signs, which is counting equal bits. What makes that learn: each input channel has a
threshold of its own, everything between the layers stays real (`galago.models.reactnet`), and the gradient of a sign is
that of a curve that leads from -1 to 1 and is steepest at the threshold.

    inputs   u = x + b_c,  a = sign(u) in {-1, 1},  sign(0) = 1;   da/du = max(0, 2 - 2|u|);   b_c starts at 0
    weights  W_hat = alpha_c sign(W),  alpha_c = mean|W_c|, a constant to the gradient;   dW_hat/dW = 1 where |W| <= 1

Inputs beyond 1 on either side of the threshold are saturated: no gradient passes, and the weights before them get next
to none. Adam divides by the size of a weight's gradients and so still moves such weights, which plain SGD leaves where
they were. Decay makes real weights small, so that their signs turn more easily: good for finding a start, bad for
settling. Hence two trainings, both with Adam and with a teacher's probabilities as the only loss (`SoftTargets` with
temperature 1 and task_weight 0, whose gradient is the paper's): first with binary inputs and real weights (`Quantize`
with `weight: null`), with decay; then from there (`galago.quantize.two_steps`) with binary weights, without decay.

When to use it: where the file has to be as small as can be, 1 bit a weight, and accuracy may be given for it (paper,
ImageNet: 65.9 % for ReActNet-18, 70.5 % for ReActNet-A). Always begin with the first step: binary weights learn little
from random ones. Training adds a comparison to each input, and to its gradient a product and a sum. Engines for
processors have no kernels for bits. OpenVINO 2026.4 runs these layers on 8-bit integers, if the first or last layer is
quantized too (without any affine quantizer in the file it does not look for integers); ONNX Runtime 1.31 runs them in
float, since what is between them is real.

Recipe: recipes/quantize/reactnet_w1a1_cifar10.yaml.

Design choices: sign(0) is 1 everywhere (the public code's 0 is no bit). Signs are exact, and found by comparing x with
-b_c, as the engines do (the public code has them up to 1e-7). Padding is 0, which is neither sign: the codes -1 and 1
have a zero point of 0 between them, so that it stays exact in a file. alpha_c is kept above 1e-8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.quantize.quantizer import Grid, Quantizer, along

SMALLEST_SCALE = 1e-8
OUTSIDE = 1 + 2**-23  # the first number above 1 in float32


def sign(x: Tensor, shift: Tensor) -> Tensor:
    """The sign of `x + shift`, 1 or -1, 1 for 0; differentiable in both.

    Args:
        x: values, N×C×…
        shift: b_c, one for each channel, or a scalar.

    >>> x = torch.tensor([[-2.0, 0.0, 0.25]], requires_grad=True)
    >>> y = sign(x, torch.zeros(3))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([[-1.0, 1.0, 1.0]], [[0.0, 2.0, 1.5]])
    """
    signs: Tensor = _Sign.apply(x, shift)
    return signs


def bits_of(x: Tensor, threshold: Tensor) -> Tensor:
    """1 where `x` reaches the threshold and -1 elsewhere, in the type of `x`."""
    wide = x.to(torch.promote_types(x.dtype, threshold.dtype))
    return (wide >= threshold).to(x.dtype).mul_(2).sub_(1)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, shift)
        return bits_of(x, -along(shift, x, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, shift = (saved.detach() for saved in ctx.saved_tensors)
        shifts = along(shift, x, 1)
        u = x.to(torch.promote_types(x.dtype, shift.dtype)) + shifts
        grad_u = u.abs_().mul_(-2).add_(2).clamp_(min=0).mul_(grads[0])
        return grad_u.to(x.dtype), grad_u.sum_to_size(shifts.shape).view(shift.shape)


def scaled_sign(weight: Tensor, scale: Tensor) -> Tensor:
    """`scale` where a weight is 0 or more and `-scale` elsewhere; gradient 1 where |weight| <= 1.

    Args:
        weight: any shape.
        scale: broadcasts against it; a constant.

    >>> weight = torch.tensor([0.0, -1.0, 1.5], requires_grad=True)
    >>> y = scaled_sign(weight, torch.tensor(0.5))
    >>> y.sum().backward()
    >>> y.tolist(), weight.grad.tolist()
    ([0.5, -0.5, 0.5], [1.0, 1.0, 0.0])
    """
    scaled: Tensor = _ScaledSign.apply(weight, scale)
    return scaled


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.where(weight >= 0, scale, -scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = (saved.detach() for saved in ctx.saved_tensors)
        # One pass that is zero on or beyond two numbers. -1 and 1 themselves pass.
        return torch.ops.aten.hardtanh_backward(grads[0], weight, -OUTSIDE, OUTSIDE), None


class RSign(Quantizer):
    """The sign of a layer's input, with a learned threshold for each channel.

    Args:
        channels: of the input, along its second axis; none: as many as the first batch has.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.bits, self.channels = 1, channels
        self.shift = nn.Parameter(torch.zeros(() if channels is None else channels))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Thresholds of 0, as many as there are channels, whatever the values."""
        check_one_bit("RSign", self.bits, "edge_input")
        self.channels = x.shape[1]
        self.shift.data = torch.zeros(self.channels, device=self.shift.device)

    def forward(self, x: Tensor) -> Tensor:
        return sign(x, self.shift)

    def codes(self, x: Tensor) -> Tensor:
        """By comparison, which every engine has."""
        return bits_of(x, -along(self.shift.detach(), x, 1)).float()

    def grid(self) -> Grid:
        one = torch.ones((), device=self.shift.device)
        return Grid(one, torch.zeros_like(one), -1, 1, step=2)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class BinaryWeight(Quantizer):
    """The signs of a weight times the mean size of each output channel."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bits = 1
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Gives the scale its shape, one element an output channel."""
        check_one_bit("BinaryWeight", self.bits, "edge_weight")
        self.scale = mean_size(x)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.copy_(mean_size(x.detach()))
        return scaled_sign(x, along(self.scale, x, 0))

    def codes(self, x: Tensor) -> Tensor:
        self.scale.copy_(mean_size(x.detach()))
        return bits_of(x.detach().float(), torch.zeros((), device=x.device))

    def grid(self) -> Grid:
        scale = self.scale.clone()
        return Grid(scale, torch.zeros_like(scale), -1, 1, step=2, axis=0)


def mean_size(weight: Tensor) -> Tensor:
    """alpha_c: the mean of |W| over each slice along the first axis, float32.

    >>> mean_size(torch.tensor([[1.0, -3.0], [0.0, 0.5]]))
    tensor([2.0000, 0.2500])
    """
    return weight.float().abs().flatten(1).mean(1).clamp_min(SMALLEST_SCALE)


def check_one_bit(kind: str, bits: int, instead: str) -> None:
    """Refuses the 8 bits that `Quantize` gives the first and last layer unless it is told otherwise."""
    if bits != 1:
        raise UserError(
            f"{kind}: bits is {bits}, but a sign has 1; give `{instead}` another kind, or `edge_bits: null`"
        )
