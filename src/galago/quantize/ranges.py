"""Searching ranges: which part of a tensor's values a quantizer is to cover, as plain functions.

Every search takes `rows`, one row for each range that is wanted (`rows_of`), and gives a `Range`, one element a row. A
wide range clips nothing and has coarse steps; what it is worth to clip is where the searches differ.

    min-max      everything
    percentile   all but the share 1 - p of the values that are largest in size (of a histogram of |x|, 2048 bins)
    error        the candidate (1 - i/100) (min, max), i = 0 … 79, of least mean |Q(x) - x|^p; the first of equals
    entropy      the threshold t whose quantized histogram of |x| is nearest to the clipped one: least KL(p || q)
    deviations   mean ± k standard deviations, never beyond min and max

`affine` and `symmetric` turn a range into scale and zero point. As in Krishnamoorthi, "Quantizing deep convolutional
networks for efficient inference", 2018, arXiv:1806.08342; the search by error follows the public code of BRECQ
(arXiv:2102.05426), p = 2.4 punishing clipping more than p = 2. The search by entropy, TensorRT's, is told from memory.

Design choices: ranges are widened to contain 0 before they are searched, so that zero padding is exact and zero points
lie on the grid (BRECQ's code leaves both out, which differs for slices of one sign). Exact zeros are left out of the
entropy's histogram: behind a ReLU they are half of all values and would decide alone. Bins are merged into levels so
that level floor(j L / i) gets bin j of i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8
BINS = 2048
CANDIDATES = 80


class Range(NamedTuple):
    """Where values are covered, one element a row; `low` is never positive, `high` never negative."""

    low: Tensor
    high: Tensor

    def times(self, factor: float) -> Range:
        """Both ends, nearer to zero or further from it."""
        return Range(self.low * factor, self.high * factor)

    def within(self, threshold: Tensor) -> Range:
        """No wider than `threshold` on either side."""
        return Range(self.low.maximum(-threshold), self.high.minimum(threshold))


class Coding(NamedTuple):
    """How a range becomes codes, one element a row each."""

    scale: Tensor
    zero_point: Tensor


def rows_of(x: Tensor, per_channel: bool) -> Tensor:
    """The values as rows, float32 at least: one for each slice along the first axis, or all in one.

    >>> rows_of(torch.zeros(4, 3, 5, 5), per_channel=True).shape
    torch.Size([4, 75])
    """
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    return x.reshape(len(x), -1) if per_channel else x.reshape(1, -1)


def sample(rows: Tensor, most: int = 2**20) -> Tensor:
    """At most so many values of each row, drawn at random but always the same; the ends of the range are among them."""
    if rows.shape[1] <= most:
        return rows
    drawn = torch.randint(rows.shape[1], (most - 2,), generator=torch.Generator().manual_seed(0)).to(rows.device)
    ends = torch.stack(rows.aminmax(dim=1), dim=1)
    return torch.cat([rows[:, drawn], ends], dim=1)


def spanned(rows: Tensor) -> Range:
    """Min-max: all values, and 0.

    >>> spanned(torch.tensor([[1.0, 3.0], [-2.0, 1.0]]))
    Range(low=tensor([ 0., -2.]), high=tensor([3., 1.]))
    """
    low, high = rows.aminmax(dim=1)
    return Range(low.clamp_max(0.0), high.clamp_min(0.0))


def percentile(rows: Tensor, share: float, bins: int = BINS) -> Range:
    """All but the largest: the size that a share of the values does not exceed, to the upper edge of a bin.

    >>> percentile(torch.arange(100.0)[None], share=0.5, bins=99).high
    tensor([50.])
    """
    counts, width = histogram(rows, bins)
    total = counts.sum(1, keepdim=True)
    covered = counts.cumsum(1) >= share * total - 1e-9 * total
    edge = covered.to(torch.uint8).argmax(1) + 1  # the first bin that is covered
    threshold = torch.where(edge == bins, rows.abs().amax(1), edge * width)
    return spanned(rows).within(threshold.to(rows.dtype))


def deviations(rows: Tensor, count: float) -> Range:
    """`count` standard deviations around the mean; at most what the values span."""
    mean, deviation, whole = rows.mean(1), rows.std(1, correction=0), spanned(rows)
    low, high = (mean - count * deviation).clamp_max(0.0), (mean + count * deviation).clamp_min(0.0)
    return Range(low.maximum(whole.low), high.minimum(whole.high))


def least_error(
    rows: Tensor, rounded: Callable[[Range], Tensor], power: float = 2.4, candidates: int = CANDIDATES
) -> Range:
    """The part of the whole range in which rounding costs the least mean `|Q(x) - x|^power`.

    Args:
        rows: values.
        rounded: gives all of them, rounded in a range; see `rounding`.
        power: how much more a large error counts than a small one.
        candidates: the last one is (1 - candidates / 100) of the whole.
    """
    whole = spanned(rows)
    best, least = whole, torch.full_like(whole.low, torch.inf)
    for number in range(candidates):
        tried = whole.times(1.0 - 0.01 * number)
        error = (rounded(tried) - rows).abs_().pow_(power).mean(1)
        better = error < least
        least = torch.where(better, error, least)
        best = Range(torch.where(better, tried.low, best.low), torch.where(better, tried.high, best.high))
    return best


def entropy(rows: Tensor, levels: int, bins: int = BINS) -> Range:
    """The threshold on sizes that changes the distribution of the values least.

    Args:
        rows: values; zeros do not count.
        levels: of one side of the quantizer: 128 where 8 bits hold both signs, 256 where they hold one.
        bins: of the histogram, more than `levels`.
    """
    counts, width = histogram(rows, bins, zeros=False)
    best, least = torch.full_like(width, bins), torch.full_like(width, torch.inf)
    for kept in range(min(levels, bins), bins + 1):
        divergence = _divergence(counts, kept, levels)
        better = divergence < least
        least = torch.where(better, divergence, least)
        best = torch.where(better, float(kept), best)
    threshold = torch.where(best == bins, rows.abs().amax(1), (best + 0.5) * width)
    return spanned(rows).within(threshold.to(rows.dtype))


def _divergence(counts: Tensor, kept: int, levels: int) -> Tensor:
    """KL(p || q) of the first `kept` bins with all others piled on the last one, and of these in `levels` levels."""
    plain = counts[:, :kept]
    clipped = plain.clone()
    clipped[:, -1] += counts[:, kept:].sum(1)
    level = torch.arange(kept, device=counts.device) * min(levels, kept) // kept
    places = level.expand_as(plain)
    filled = (plain > 0).to(plain.dtype)
    sums, members = (torch.zeros(len(plain), levels, dtype=plain.dtype, device=plain.device) for _ in range(2))
    sums.scatter_add_(1, places, plain)
    members.scatter_add_(1, places, filled)
    spread = (sums / members.clamp_min(1)).gather(1, places) * filled
    p = clipped / clipped.sum(1, keepdim=True).clamp_min(1)
    q = (spread / spread.sum(1, keepdim=True).clamp_min(1)).clamp_min(1e-12)
    return torch.where(p > 0, p * (p / q).clamp_min(1e-300).log(), 0.0).sum(1)


def histogram(rows: Tensor, bins: int = BINS, zeros: bool = True) -> tuple[Tensor, Tensor]:
    """How many values have which size: counts, rows × bins, and the width of a bin for each row, float64.

    Args:
        rows: values.
        bins: from 0 to the largest size of the row.
        zeros: whether exact zeros count.
    """
    size = rows.abs()
    width = (size.amax(1).double() / bins).clamp_min(1e-300)
    found = (size / width.to(rows.dtype).clamp_min(1e-30)[:, None]).long().clamp_(0, bins - 1)
    places = found + bins * torch.arange(len(rows), device=rows.device)[:, None]
    counts = torch.bincount((places if zeros else places[size > 0]).flatten(), minlength=bins * len(rows))
    return counts.view(len(rows), bins).double(), width


def affine(covered: Range, low: int, high: int) -> Coding:
    """`s = (M - m) / (high - low)`, `z = clip(low - round(m / s), low, high)`.

    >>> affine(Range(torch.tensor([-1.0]), torch.tensor([2.0])), 0, 255).zero_point
    tensor([85.])
    """
    scale = ((covered.high - covered.low) / (high - low)).clamp_min(SMALLEST_SCALE)
    return Coding(scale, (low - (covered.low / scale).round()).clamp(low, high))


def symmetric(covered: Range, low: int, high: int) -> Coding:
    """`s = max(|m|, |M|) / ((high - low) / 2)`, `z = 0`.

    >>> symmetric(Range(torch.tensor([-3.0]), torch.tensor([2.0])), -2, 1).scale
    tensor([2.])
    """
    scale = (covered.high.maximum(-covered.low) / ((high - low) / 2)).clamp_min(SMALLEST_SCALE)
    return Coding(scale, torch.zeros_like(scale))


def rounding(
    rows: Tensor, coding: Callable[[Range, int, int], Coding], low: int, high: int
) -> Callable[[Range], Tensor]:
    """A function that rounds these rows in any range, for `least_error`.

    Args:
        rows: values.
        coding: `affine` or `symmetric`.
        low: smallest code.
        high: largest code.
    """

    def rounded(covered: Range) -> Tensor:
        scale, zero_point = (each[:, None] for each in coding(covered, low, high))
        return (rows / scale).round_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale)

    return rounded
