"""GroupWise: one weight scale for a group of output channels.

Yuan, Chen, Hu and Peng, "Towards Low-Bit Quantization of Deep Neural Networks with Limited Data", ICPR 2020 (no arXiv
id, no public code).

Between one scale a layer, which one wide channel spoils for all, and one a channel, which costs an engine as many
scales as there are channels: output channels fall into G groups, and each group is rounded with a scale of its own.

    W_hat_c = s_g(c) clip(round(W_c / s_g(c)), -2^(b-1), 2^(b-1) - 1)
    s_g     = argmin mean|W_hat - W|^2.4 over p max|W_g| / ((2^b - 1) / 2),   p = 1, 0.99, …, 0.2,   then learned

G = 1 is one scale a layer, G = O one a channel. The scales learn as LSQ's steps do, their gradients multiplied by
1 / sqrt(N_g (2^(b-1) - 1)), where N_g weights share one.

When to use it: weights of 3 to 8 bits with few images, where a network is quantized without training or with little:
the scales fit the weights from the start. It costs what LSQ costs, and the search once. Depth-wise layers want more
groups, their channels differ most. How many values share a scale (a tensor's, a group's, a channel's) is a choice of
its own, open to every recipe: this quantizer goes wherever `LSQWeight` does, with any input quantizer and any method.

Recipe: recipes/quantize/group_wise_w4a8_resnet20_cifar10.yaml.

Of the paper only the abstract could be had, which fixes the groups of output channels and no more. Design choices: the
ways to form groups, the search (that of BRECQ's code, whose exponent of 2.4 minds clipping more than squares do) and
the learning. Grids are symmetric, as engines want weights. With fewer channels than groups each channel is a group.
Groups are formed once; exported, each channel has its group's scale, so engines see scales per channel. Signed 8-bit
weights leave out the code -128. The first axis of the weight counts as the output channels, also where a transposed
convolution has its inputs there.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.quantize.learned_step import SMALLEST_STEP, learned_step
from galago.quantize.quantizer import Grid, Quantizer, along, check_bits, integer_range

EXPONENT = 2.4
SHRINKS = 80  # of a hundredth each


class Arrangement(Enum):
    """Which channels form a group."""

    contiguous = "contiguous"  # neighbors
    sorted = "sorted"  # equally many of similar range
    clustered = "clustered"  # the best split of the logarithms of their ranges, in the sense of k-means


def groups_of(ranges: Tensor, groups: int, arrangement: Arrangement) -> Tensor:
    """The group of each channel, 0 … groups - 1; none is empty.

    Args:
        ranges: largest absolute weight of each channel.
        groups: how many, at most as many as channels.
        arrangement: which channels belong together.

    >>> ranges = torch.tensor([1.0, 9.0, 1.1, 8.0, 1.2, 1.3])
    >>> [groups_of(ranges, 2, how).tolist() for how in Arrangement]
    [[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0]]
    """
    cut = torch.arange(len(ranges), device=ranges.device) * groups // len(ranges)
    if arrangement is Arrangement.contiguous:
        return cut
    ordered, order = ranges.sort(stable=True)
    if arrangement is Arrangement.clustered:
        positive = ordered[ordered > 0]
        floor = float(positive[0]) if len(positive) else 1.0  # channels of nothing but zeros fit in anywhere
        cut = best_split(ordered.double().clamp_min(floor).log(), groups)
    return torch.empty_like(cut).scatter_(0, order, cut)


def best_split(ordered: Tensor, groups: int) -> Tensor:
    """One-dimensional k-means, exactly: the cuts of ascending numbers with the least squared distances to the means.

    By dynamic programming over how many of the first numbers the first groups hold.

    >>> best_split(torch.tensor([1.0, 1.1, 5.0, 5.1, 9.0]), 3)
    tensor([0, 0, 1, 1, 2])
    """
    count, numbers = len(ordered), (ordered - ordered.mean()).double()
    nothing = numbers.new_zeros(1)
    sums, squares = (torch.cat([nothing, powers.cumsum(0)]) for powers in (numbers, numbers.square()))
    ends = torch.arange(count + 1, device=ordered.device)
    length = ends[None] - ends[:, None]  # of what begins at a row's number and ends before a column's
    spread = squares[None] - squares[:, None] - (sums[None] - sums[:, None]).square() / length.clamp_min(1)
    cost = torch.where(length > 0, spread.clamp_min(0), math.inf)
    least, starts = cost[0], []
    for _ in range(1, groups):
        least, start = (least[:, None] + cost).min(0)
        starts.append(start)
    cut, end = torch.zeros(count, dtype=torch.int64, device=ordered.device), count
    for start in reversed(starts):
        end = int(start[end])
        cut[end:] += 1
    return cut


def best_steps(weight: Tensor, group: Tensor, groups: int, low: int, high: int) -> Tensor:
    """The step of each group that rounds its weights with the least error to the power of 2.4."""
    rows = weight.detach().flatten(1).float()
    largest = rows.new_zeros(groups).scatter_reduce_(0, group, rows.abs().amax(1), "amax")
    widest = (largest / ((high - low) / 2)).clamp_min(SMALLEST_STEP)
    best, least = widest, torch.full_like(widest, math.inf)
    for shrink in range(SHRINKS + 1):
        steps = (widest * (1 - shrink / 100)).clamp_min(SMALLEST_STEP)
        each = steps[group, None]
        errors = ((rows / each).round_().clamp_(low, high).mul_(each) - rows).abs_().pow_(EXPONENT).sum(1)
        error = torch.zeros_like(least).index_add_(0, group, errors)
        best, least = torch.where(error < least, steps, best), torch.minimum(error, least)
    return best


class _Shared(torch.autograd.Function):
    """A group's step for each of its channels; backward the sum over them, times the group's gradient scale."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, group: Tensor, channel_weights: int, high: int) -> Tensor:
        ctx.save_for_backward(group)
        ctx.groups, ctx.channel_weights, ctx.high = len(step), channel_weights, high
        return step[group]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (group,), grad = ctx.saved_tensors, grads[0]
        nothing = grad.new_zeros(ctx.groups)
        channels = nothing.index_add(0, group, torch.ones_like(grad))
        total = nothing.index_add(0, group, grad)
        return total * (channels * (ctx.channel_weights * ctx.high)).rsqrt(), None, None, None


class GroupWiseWeight(Quantizer):
    """Learned steps for weights, each shared by a group of output channels and first set to where rounding loses least.

    Args:
        bits: width of the integer, 2 to 8.
        groups: how many; 1 is one step for the layer, the number of channels or more one for each channel.
        arrangement: which channels form a group: neighbors (`contiguous`), equally many of similar range (`sorted`),
            or those whose ranges are closest (`clustered`).
    """

    group: Tensor

    def __init__(self, bits: int = 4, groups: int = 4, arrangement: Arrangement = Arrangement.contiguous) -> None:
        super().__init__()
        check_bits("GroupWiseWeight", bits, lowest=2)
        if groups < 1:
            raise UserError(f"GroupWiseWeight: groups is {groups}; give 1 for one scale a layer, or more")
        self.bits, self.groups = bits, groups
        self.arrangement = Arrangement(arrangement)  # by its name where a record is read
        self.step = nn.Parameter(torch.ones(1))
        self.register_buffer("group", torch.zeros(1, dtype=torch.int64))

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return integer_range(self.bits, signed=True, narrow=self.bits == 8)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Forms the groups and gives the step its shape, one element a group, and its values."""
        groups = min(self.groups, len(x))
        self.group = groups_of(x.abs().flatten(1).amax(1).float(), groups, self.arrangement)
        self.step.data = best_steps(x, self.group, groups, *self.limits)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.limits
        steps: Tensor = _Shared.apply(self.step, self.group, math.prod(x.shape[1:]), high)
        return learned_step(x, along(steps, x, 0), low, high)

    def grid(self) -> Grid:
        steps = self.step.detach().clamp_min(SMALLEST_STEP)[self.group]
        return Grid(steps, torch.zeros_like(steps), *self.limits, axis=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, groups={len(self.step)}, arrangement={self.arrangement.name}"
