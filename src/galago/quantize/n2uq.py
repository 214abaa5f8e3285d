"""N2UQ: nonuniform-to-uniform quantization, where the borders between levels learn and the levels stay equidistant.

Liu, Cheng, Huang, Xing and Shen, "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation", CVPR 2022, arXiv:2111.14826.

What comes in is compared with learned thresholds, and how many it exceeds is its code, which an integer engine
multiplies like any other. A border has no gradient of its own; it gets that of the expected code if values between two
levels were rounded up or down at random (G-STE). Weights are scaled so that all codes occur about equally often.

    inputs   z = b1 x,  segments a_1 … a_N from s on, t_i = s + a_1 + … + a_i,  N = 2^b - 1,  I = 2 / N
             k = #{i : z > t_(i-1) + a_i / 2},   x_hat = b2 I k
             gradient of  h(z) = I (i - 1) + I (z - t_(i-1)) / a_i  in segment i, constant outside; b2 has I k
    weights  s_c = (2^b - 1) / 2^(b-1) mean|W_c|,  k = round((clip(W_c / s_c, -1, 1) + 1) N / 2)
             W_hat = s_c (2k / N - 1)

When to use it: 2 to 4 bits, with a teacher's probabilities as the only loss (`SoftTargets` with temperature 1 and
task_weight 0), as the paper trains it; where size counts more than speed. In files the inputs are N comparisons in
float before the integer layer, which can make a small network slower than in float (results/quantizers.md); a `stream`
lets the convolutions before them compute in integers. A training step costs N sums a tensor.

Recipe: recipes/quantize/n2uq_w2a2_resnet20_cifar10.yaml.

Chosen where paper and public code leave it open: the start follows the data (the paper's inputs lie in [0, 2] because
the network was made for it; here b1 maps the mean of the first batch to that of a half-normal variable reaching 2, and
b2 = 1 / b1). b2 is kept above 1e-8, since a scale is positive. Weights get the gradient as it is (`clip_gradient:
false`, which an optimizer that adapts to size makes the same as the public code's division by s_c), or only inside
[-s_c, s_c]. Lengths are kept above 1e-3 as in the public code: at or below, only that length's own gradient is zero.
The network keeps its own nonlinearities; the paper puts a ReActNet PReLU before each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galago.quantize.blocks import in_blocks, inner_product
from galago.quantize.quantizer import Grid, OwnRates, Quantizer, along, check_bits

SHORTEST = 1e-3  # segment, as in the public code
SMALLEST_SCALE = 1e-8
STEEP = 3e38  # raises every normal difference to 1 and more
WIDTH = 2.0  # of the output, and of the input at the start
HALF_NORMAL_MEAN = 0.53  # of a half-normal variable of which one in 400 lies above 2


def lengths(segments: Tensor) -> Tensor:
    """The segment lengths that count: none shorter than 1e-3."""
    return segments.clamp_min(SHORTEST)


def ends(start: Tensor, segments: Tensor) -> Tensor:
    """Where segments begin and end, t_0 … t_N."""
    return torch.cat([start.view(1), start + lengths(segments).cumsum(0)])


def thresholds(start: Tensor, segments: Tensor) -> Tensor:
    """The middle of each segment, N of them, rising.

    >>> thresholds(torch.tensor(0.1), torch.tensor([0.3, 0.5, 1.1]))
    tensor([0.2500, 0.6500, 1.4500])
    """
    return ends(start, segments)[:-1] + lengths(segments) / 2


def count_exceeded(z: Tensor, borders: Tensor) -> Tensor:
    """How many of the rising borders lie below each value: its code, of the type of `z`.

    >>> count_exceeded(torch.tensor([0.25, 0.3, 9.0]), torch.tensor([0.25, 0.65, 1.45]))
    tensor([0., 1., 3.])
    """
    exceeded = above(z, borders[0])
    for border in borders[1:]:
        exceeded = exceeded + above(z, border)
    return exceeded


def above(z: Tensor, border: Tensor) -> Tensor:
    """1 where a value is larger than the border, else 0, of the type of `z`."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # No comparison, whose result the compiler would store, slowly, as booleans.
        return ((z - border) * STEEP).clamp(0, 1)
    return (z > border).to(z.dtype)


def threshold_round(x: Tensor, start: Tensor, segments: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
    """`scale * (2 / N) * #{i : gain * x > T_i}`, with the gradients of G-STE in all five.

    Args:
        x: values of any shape.
        start: where the first segment begins, a scalar.
        segments: lengths, N = 2^bits - 1 of them.
        gain: beta_1, a scalar.
        scale: beta_2, a scalar.

    >>> start, segments, one = torch.tensor(0.0), torch.full((3,), 2 / 3), torch.tensor(1.0)
    >>> threshold_round(torch.tensor([-1.0, 0.5, 9.0]), start, segments, one, one)
    tensor([0.0000, 0.6667, 2.0000])
    """
    rounded: Tensor = _ThresholdRound.apply(x, start, segments, gain, scale)
    return rounded


class _ThresholdRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, segments: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
        borders, distance = thresholds(start, segments), level_distance(scale, len(segments))

        def compute(x: Tensor) -> tuple[Tensor]:
            wide = x.to(torch.promote_types(x.dtype, gain.dtype))
            return (count_exceeded(wide * gain, borders) * distance,)

        rounded = in_blocks(compute, x)[0].to(x.dtype)
        ctx.save_for_backward(x, rounded, start, segments, gain, scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rounded, start, segments, gain, scale = (saved.detach() for saved in ctx.saved_tensors)

        def compute(x: Tensor, grad: Tensor, rounded: Tensor) -> tuple[Tensor, ...]:
            return gradients(x, grad, rounded, start, segments, gain, scale)

        grad_x, grad_gain, grad_scale, grad_start, *grad_segments = in_blocks(compute, x, grads[0], rounded)
        return grad_x, grad_start, torch.stack(grad_segments) * (segments > SHORTEST), grad_gain, grad_scale


def gradients(
    x: Tensor, grad: Tensor, rounded: Tensor, start: Tensor, segments: Tensor, gain: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Of the input, the gain, the scale, the start, and each segment's length.

    Segments are gone through from the last to the first, so that `slope` is, for values beyond the present one, that of
    the segment in which they lie. One sum a segment, since sums are costly.
    """
    wide = x.to(torch.promote_types(x.dtype, gain.dtype))
    z, grad = wide * gain, grad.to(wide.dtype)
    spans, distance = lengths(segments), level_distance(scale, len(segments))
    borders = ends(start, segments)
    slope, beyond = torch.zeros_like(z), above(z, borders[-1])
    grad_segments = []
    for low, span in zip(borders[:-1].flip(0), spans.flip(0), strict=True):
        exceeded = above(z, low)
        steepness = (exceeded - beyond) / span  # in the segment, its upper end included, else 0
        grad_segments.append(-distance * inner_product(slope + steepness * ((z - low) / span), grad))
        slope, beyond = slope + steepness, exceeded
    slope = slope * (grad * distance)
    grad_scale = inner_product(grad, rounded.to(grad.dtype)) / scale.clamp_min(SMALLEST_SCALE)
    return slope * gain, inner_product(slope, wide), grad_scale, -slope.sum(), *reversed(grad_segments)


def level_distance(scale: Tensor, steps: int) -> Tensor:
    """What a code is multiplied by."""
    return scale.clamp_min(SMALLEST_SCALE) * (WIDTH / steps)


class N2UQ(Quantizer):
    """Learned thresholds and equidistant levels, for a layer's input.

    Args:
        bits: width of the integer, 1 to 4.
        learning_rate_factor: of thresholds and scales, against the weights' (paper: 0.1).
        fit: let the start follow the first batch; else the paper's, for inputs made to lie in [0, 2].
    """

    def __init__(self, bits: int = 2, learning_rate_factor: float = 0.1, fit: bool = True) -> None:
        super().__init__()
        check_bits("N2UQ", bits, highest=4)
        self.bits, self.learning_rate_factor, self.fit = bits, learning_rate_factor, fit
        self.start = nn.Parameter(torch.zeros(()))
        self.segments = nn.Parameter(torch.full((self.steps,), WIDTH / self.steps))
        self.gain = nn.Parameter(torch.ones(()))
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def steps(self) -> int:
        """Number of levels less one, N."""
        return int(2**self.bits) - 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Equal segments (as many as `bits` says now), the gain from the mean of the positive inputs."""
        self.segments.data = torch.full((self.steps,), WIDTH / self.steps, device=x.device)
        if self.fit:
            positive = x.clamp_min(0.0)
            mean = positive.sum() / (positive > 0).sum().clamp_min(1)
            self.gain.copy_(HALF_NORMAL_MEAN / mean.clamp_min(SMALLEST_SCALE))
            self.scale.copy_(1 / self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return threshold_round(x, self.start, self.segments, self.gain, self.scale)

    def codes(self, x: Tensor) -> Tensor:
        """By comparisons, which every engine has."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return count_exceeded(wide * self.gain.detach(), thresholds(self.start, self.segments).detach()).float()

    def grid(self) -> Grid:
        distance = level_distance(self.scale.detach(), self.steps)
        return Grid(distance, torch.zeros_like(distance), 0, self.steps)

    def own_rates(self) -> OwnRates:
        return OwnRates(self.learning_rate_factor, weight_decay=0.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class N2UQWeight(Quantizer):
    """Weights scaled, channel by channel, so that every code is about equally frequent; the grid has no zero.

    Args:
        bits: width of the integer, 1 to 4.
        clip_gradient: no gradient for weights beyond the outermost levels.
    """

    scale: Tensor

    def __init__(self, bits: int = 2, clip_gradient: bool = False) -> None:
        super().__init__()
        check_bits("N2UQ", bits, highest=4)
        self.bits, self.clip_gradient = bits, clip_gradient
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Gives the scale its shape, one element an output channel."""
        self.scale = self._scale_of(x)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.copy_(self._scale_of(x))
            rounded = self.grid().values(self._rounded(x)).to(x.dtype)
            kept = x.abs() <= along(self.scale, x, 0) if self.clip_gradient else None
        return rounded + (x - x.detach() if kept is None else (x - x.detach()) * kept)

    def codes(self, x: Tensor) -> Tensor:
        self.scale.copy_(self._scale_of(x.detach()))
        return self._rounded(x.detach())

    def grid(self) -> Grid:
        steps = int(2**self.bits) - 1
        scale = self.scale / steps
        return Grid(scale, torch.zeros_like(scale), -steps, steps, step=2, axis=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def _rounded(self, weight: Tensor) -> Tensor:
        """Odd codes `2k - N`."""
        steps = int(2**self.bits) - 1
        unit = (weight.float() / along(self.scale, weight, 0)).clamp(-1, 1)
        codes: Tensor = 2 * ((unit + 1) * (steps / 2)).round() - steps
        return codes

    def _scale_of(self, weight: Tensor) -> Tensor:
        mean = weight.float().abs().flatten(1).mean(1)
        scale: Tensor = ((2**self.bits - 1) / 2 ** (self.bits - 1) * mean).clamp_min(SMALLEST_SCALE)
        return scale
