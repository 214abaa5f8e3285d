"""LSQ: learned step size quantization.

Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.

The distance between two levels is a parameter that learns with the network: each value's rounding error tells the step
whether to grow or to shrink, and values beyond the last level pull it outward.

    v_bar = round(clip(v / s, -Q_n, Q_p)),   v_hat = s v_bar
    dv_hat/dv = 1  where -Q_n < v/s < Q_p, else 0
    dv_hat/ds = v_bar - v/s  there;  -Q_n below;  Q_p above;  the sum is multiplied by 1 / sqrt(N Q_p)

When to use it: the plain choice at 3 to 8 bits, for weights, inputs and residual streams alike, also behind activations
with negative values. It costs a few element-wise operations and two sums a tensor.

Recipe: recipes/quantize/lsq_w4a4_resnet20_cifar10.yaml.

Chosen where the paper is silent or the public codes differ: the inequalities are strict, as printed (the public codes
let the bounds themselves through). `N` counts the features of one sample for inputs and the weights that share a step
for weights; the public codes count the batch too (`count_batch`). The step is kept above 1e-8. Signed 8-bit weights
leave out the code -128, so that flipping their signs on export cannot overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from galago.quantize.learned_step import SMALLEST_STEP, learned_step
from galago.quantize.quantizer import Grid, Quantizer, along, check_bits, integer_range


def initial_step(v: Tensor, high: int) -> Tensor:
    """`2 mean|v| / sqrt(Q_p)`, over everything, as a scalar."""
    return (2 * v.abs().mean() / math.sqrt(high)).clamp_min(SMALLEST_STEP)


class LSQ(Quantizer):
    """Learned step size for what flows through a network: a layer's input, a residual stream.

    Args:
        bits: width of the integer, 1 to 8.
        signed: whether negative values occur; none: decided by the first batch.
        count_batch: count the whole batch in the step's gradient scale, as public codes do, not one sample.
    """

    def __init__(self, bits: int = 4, signed: bool | None = None, count_batch: bool = False) -> None:
        super().__init__()
        check_bits("LSQ", bits, lowest=2 if signed else 1)
        self.bits, self.signed, self.count_batch = bits, signed, count_batch
        self.step = nn.Parameter(torch.ones(()))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, signed=bool(self.signed))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Decides about the sign where that was left open; sets the step from the mean size of `x`."""
        if self.signed is None:
            self.signed = bool((x < 0).any())
        check_bits("LSQ", self.bits, lowest=2 if self.signed else 1)
        self.step.copy_(initial_step(x, self.limits[1]))

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.limits
        features = math.prod(x.shape if self.count_batch else x.shape[1:])
        return learned_step(x, self.step, low, high, 1 / math.sqrt(features * high))

    def grid(self) -> Grid:
        return Grid(self.step.detach().clamp_min(SMALLEST_STEP), torch.zeros_like(self.step), *self.limits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class LSQWeight(Quantizer):
    """Learned step size for weights: signed, one step a tensor (as in the paper) or one an output channel.

    Args:
        bits: width of the integer, 2 to 8.
        per_channel: one step for each slice along the weight's first axis.
    """

    def __init__(self, bits: int = 4, per_channel: bool = True) -> None:
        super().__init__()
        check_bits("LSQ", bits, lowest=2)
        self.bits, self.per_channel = bits, per_channel
        self.step = nn.Parameter(torch.ones(()))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, signed=True, narrow=self.bits == 8)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Gives the step its shape (a scalar, or one element an output channel) and its value."""
        slices = x if self.per_channel else x[None]
        steps = torch.stack([initial_step(one, self.limits[1]) for one in slices])
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
