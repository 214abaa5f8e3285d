"""MinMax: plain quantization-aware training, the reference that others have to beat.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877.

Nothing is learned: the range is what the weights, or a moving average of the batches, span. Rounding is
straight-through and clipped values get no gradient.

    inputs   s = (max - min) / (2^b - 1),  z = clip(round(-min / s), 0, 2^b - 1)
             codes = clip(round(x / s) + z, 0, 2^b - 1),  x_hat = s (codes - z)
    weights  s_c = max|W_c| / (2^(b-1) - 1)  for each output channel c, symmetric, z = 0

When to use it: 8 bits, where it loses next to nothing. Below 6 bits single outliers widen the range and learned ranges
(`LSQ`, `EWGS`) are better. It costs a few element-wise operations and, while training, a minimum and a maximum a
tensor.

Recipe: recipes/bccd/cells_resnet18.yaml.

Design choices: the range always contains 0, so that zero padding is exact. Weights use the symmetric range at every
width (no -128), so that flipping their signs on export cannot overflow. A range narrower than 1e-8 is widened to that.
In evaluation mode inputs keep the range they have; weights always span what they span now. A training batch is rounded
in the range of those before it, which then follows it: so a compiled step reads the batch once, not twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galago.quantize.blocks import extremes
from galago.quantize.quantizer import Grid, Quantizer, along, check_bits, integer_range, straight_through

SMALLEST_SCALE = 1e-8


@torch.library.custom_op("galago::held", mutates_args=())
def held(number: Tensor) -> Tensor:
    """A copy that stays what it is when the original changes, also for a compiled backward pass.

    To the compiler (PyTorch 2.15) a `clone` is no more than its original, which it reads again in the backward pass,
    after a later line of the forward pass has changed it. What an operator of its own gives is kept instead.
    """
    return number.clone()


@held.register_fake
def _(number: Tensor) -> Tensor:
    return torch.empty_like(number)


class MinMax(Quantizer):
    """A range that follows the batches, for what flows through a network: a layer's input, a residual stream.

    Args:
        bits: width of the integer, 1 to 8.
        decay: how much of the range is kept at each training batch.
    """

    minimum: Tensor
    maximum: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, decay: float = 0.99) -> None:
        super().__init__()
        check_bits("MinMax", bits, lowest=1)
        self.bits, self.decay = bits, decay
        self.register_buffer("minimum", torch.zeros(()))
        self.register_buffer("maximum", torch.ones(()))
        # Kept beside the range that they follow from: a compiled step then has two numbers to read, not to work out.
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self._settle()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Takes the range of `x` as it is."""
        minimum, maximum = extremes(x.float())
        self.minimum.copy_(minimum)
        self.maximum.copy_(maximum)
        self._settle()

    def forward(self, x: Tensor) -> Tensor:
        # Rounding stands before the search for the range: the compiler does not compute again, in the backward pass,
        # what comes behind such a search, and would store masks instead.
        scale, zero_point = held(self.scale), held(self.zero_point)
        rounded = straight_through(x, scale, zero_point, *integer_range(self.bits, signed=False))
        if self.training:
            minimum, maximum = extremes(x.detach())
            self.minimum.lerp_(minimum.float(), 1 - self.decay)
            self.maximum.lerp_(maximum.float(), 1 - self.decay)
            self._settle()
        return rounded

    def _settle(self) -> None:
        low, high = integer_range(self.bits, signed=False)
        minimum = self.minimum.clamp_max(0.0)
        self.scale.copy_(((self.maximum.clamp_min(0.0) - minimum) / high).clamp_min(SMALLEST_SCALE))
        self.zero_point.copy_((-minimum / self.scale).round().clamp(low, high))

    def grid(self) -> Grid:
        return Grid(self.scale.clone(), self.zero_point.clone(), *integer_range(self.bits, signed=False))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, decay={self.decay}"


class MinMaxWeight(Quantizer):
    """The range that each output channel's weights span, symmetric.

    Args:
        bits: width of the integer, 2 to 8.
    """

    scale: Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        check_bits("MinMax", bits, lowest=2)
        self.bits = bits
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Gives the scale its shape, one element an output channel."""
        self.scale = self._spanned(x)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.copy_(self._spanned(x.detach()))
        low, high = integer_range(self.bits, signed=True, narrow=True)
        scale = along(self.scale, x, 0)
        return straight_through(x, scale, torch.zeros_like(scale), low, high)

    def codes(self, x: Tensor) -> Tensor:
        self.scale.copy_(self._spanned(x.detach()))
        return super().codes(x)

    def grid(self) -> Grid:
        low, high = integer_range(self.bits, signed=True, narrow=True)
        return Grid(self.scale.clone(), torch.zeros_like(self.scale), low, high, axis=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def _spanned(self, weight: Tensor) -> Tensor:
        largest = weight.abs().flatten(1).amax(1).float()
        return (largest / integer_range(self.bits, signed=True)[1]).clamp_min(SMALLEST_SCALE)
