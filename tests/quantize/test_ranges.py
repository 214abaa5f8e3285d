"""Range searches against the official code's numbers, brute force in float64, and what must be true of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from galago.quantize.ranges import (
    Range,
    affine,
    deviations,
    entropy,
    histogram,
    least_error,
    percentile,
    rounding,
    rows_of,
    sample,
    spanned,
    symmetric,
)


def error(rows: Tensor, coding, covered: Range, low: int, high: int, power: float) -> Tensor:
    return (rounding(rows, coding, low, high)(covered) - rows).abs().pow(power).mean(1)


def test_the_search_by_error_is_the_official_codes(golden):
    want = golden("ptq")
    rows, high = rows_of(want["ada_weight"], per_channel=True), 2 ** int(want["ada_bits"]) - 1
    found = least_error(rows, rounding(rows, affine, 0, high), power=2.4)
    scale, zero_point = affine(found, 0, high)
    torch.testing.assert_close(scale, want["mse_observer_expected_scale"], rtol=1e-5, atol=0)
    assert torch.equal(zero_point, want["mse_observer_expected_zero_point"])
    nearest = rounding(rows, affine, 0, high)(found).view_as(want["ada_weight"])
    torch.testing.assert_close(nearest, want["ada_expected_nearest"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("coding", "low", "high"), [(affine, 0, 15), (symmetric, -8, 7), (symmetric, -127, 127)])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_the_search_by_error_is_the_best_of_eighty_candidates_row_by_row(coding, low, high, power):
    rows = torch.randn(4, 60, dtype=torch.float64) ** 3
    rows[1].abs_()
    rows[2].abs_().neg_()
    found = least_error(rows, rounding(rows, coding, low, high), power)
    for row, smallest, largest in zip(rows, found.low.tolist(), found.high.tolist(), strict=True):
        least, best = math.inf, (0.0, 0.0)
        for number in range(80):
            m, M = (end * (1.0 - 0.01 * number) for end in (min(0.0, row.min().item()), max(0.0, row.max().item())))
            scale = (M - m) / (high - low) if coding is affine else max(-m, M) / ((high - low) / 2)
            zero = min(max(low - round(m / scale), low), high) if coding is affine else 0
            total = 0.0
            for value in row.tolist():
                code = min(max(round(value / scale) + zero, low), high)
                total += abs(scale * (code - zero) - value) ** power
            if total / 60 < least * (1 - 1e-12):
                least, best = total / 60, (m, M)
        assert (smallest, largest) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("power", [2.0, 2.4, 4.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_by_error_is_never_worse_than_min_max_on_what_it_saw(bits, power):
    rows = torch.randn(6, 500).pow(3)
    for coding, low, high in ((affine, 0, 2**bits - 1), (symmetric, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)):
        found = least_error(rows, rounding(rows, coding, low, high), power)
        whole = error(rows, coding, spanned(rows), low, high, power)
        assert (error(rows, coding, found, low, high, power) <= whole).all()


@pytest.mark.parametrize("rows", [torch.randn(3, 1000), torch.rand(3, 50), -torch.rand(2, 999), torch.zeros(2, 5)])
def test_percentile_one_is_min_max_exactly(rows):
    assert torch.equal(percentile(rows, 1.0).low, spanned(rows).low)
    assert torch.equal(percentile(rows, 1.0).high, spanned(rows).high)


def test_percentile_covers_its_share_and_no_whole_bin_more():
    rows = torch.randn(5, 4000)
    found = percentile(rows, 0.99)
    width = rows.abs().amax(1) / 2048
    size, threshold = rows.abs(), found.high
    assert ((size <= threshold[:, None]).float().mean(1) >= 0.99).all()
    assert ((size <= (threshold - 1.01 * width)[:, None]).float().mean(1) < 0.99).all()
    assert torch.equal(found.low, -found.high)


def test_what_lies_on_one_side_keeps_the_other_end_at_zero():
    for search in (spanned, lambda x: percentile(x, 0.9), lambda x: entropy(x, 16, 64), lambda x: deviations(x, 1.0)):
        low, high = search(torch.rand(2, 300) + 1)
        assert (low == 0).all()
        assert (high > 0).all()
        low, high = search(-torch.rand(2, 300) - 1)
        assert (low < 0).all()
        assert (high == 0).all()


def test_deviations_are_those_around_the_mean_and_never_beyond_the_values():
    rows = torch.randn(3, 2000, dtype=torch.float64) + 0.2
    found = deviations(rows, 2.0)
    torch.testing.assert_close(found.high, rows.mean(1) + 2 * rows.std(1, correction=0))
    assert torch.equal(deviations(rows, 100.0).low, spanned(rows).low)


def brute_entropy(row: list[float], levels: int, bins: int) -> float:
    """As the card tells it, in plain Python."""
    largest = max(map(abs, row))
    counts = [0] * bins
    for value in row:
        if value != 0:
            counts[min(int(abs(value) / (largest / bins)), bins - 1)] += 1
    least, best = math.inf, bins
    for kept in range(levels, bins + 1):
        p = [float(count) for count in counts[:kept]]
        p[-1] += sum(counts[kept:])
        groups: dict[int, list[int]] = {}
        for place in range(kept):
            groups.setdefault(place * levels // kept, []).append(place)
        q = [0.0] * kept
        for places in groups.values():
            filled = [place for place in places if counts[place]]
            for place in filled:
                q[place] = sum(counts[other] for other in places) / len(filled)
        total_p, total_q = sum(p), sum(q)
        divergence = sum(
            a / total_p * math.log(a / total_p / max(b / total_q, 1e-12)) for a, b in zip(p, q, strict=True) if a
        )
        if divergence < least * (1 - 1e-9) - 1e-15:
            least, best = divergence, kept
    return largest if best == bins else (best + 0.5) * largest / bins


@pytest.mark.parametrize("seed", range(4))
def test_entropy_is_the_least_divergence_of_all_thresholds(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 400, generator=generator, dtype=torch.float64).pow(3)
    rows[1].relu_()
    found = entropy(rows, levels=8, bins=64)
    for row, high, low in zip(rows, found.high.tolist(), found.low.tolist(), strict=True):
        assert max(high, -low) == pytest.approx(min(brute_entropy(row.tolist(), 8, 64), row.abs().max().item()))


def test_zeros_behind_a_relu_do_not_move_the_entropys_threshold():
    values = torch.randn(1, 3000).abs()
    with_zeros = torch.cat([values, torch.zeros(1, 50_000)], 1)
    assert torch.equal(entropy(values, 64, 512).high, entropy(with_zeros, 64, 512).high)


def test_entropy_cuts_off_a_lonely_outlier_that_min_max_keeps():
    rows = torch.cat([torch.randn(1, 20_000), torch.tensor([[60.0]])], 1)
    assert entropy(rows, 128).high.item() < 30
    assert spanned(rows).high.item() == 60


def test_a_histogram_counts_every_value_once():
    rows = torch.randn(3, 700)
    rows[0, :10] = 0
    counts, width = histogram(rows, 32)
    assert (counts.sum(1) == 700).all()
    assert histogram(rows, 32, zeros=False)[0].sum(1).tolist() == [690, 700, 700]
    reference = torch.histc(rows[1].abs(), 32, 0, rows[1].abs().max().item())
    assert (counts[1] - reference).abs().sum() <= 2  # edges
    torch.testing.assert_close(width * 32, rows.abs().amax(1).double())


def test_an_empty_row_is_usable():
    rows = torch.zeros(2, 9)
    for found in (spanned(rows), percentile(rows, 0.5), entropy(rows, 4, 16), deviations(rows, 2.0)):
        for coding in (affine(found, 0, 15), symmetric(found, -8, 7)):
            assert (coding.scale > 0).all()
            assert coding.zero_point.isfinite().all()


def test_a_sample_is_always_the_same_and_keeps_the_ends():
    rows = torch.randn(2, 10_000)
    drawn = sample(rows, 100)
    assert drawn.shape == (2, 100)
    assert torch.equal(drawn, sample(rows, 100))
    assert torch.equal(spanned(drawn).high, spanned(rows).high)
    assert sample(rows, 10_000) is rows
