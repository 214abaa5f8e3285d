"""Draws belong to an image, not to its batch; photon counts have Poisson's probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from galago.corrupt.draws import Draws, photon_columns, photon_probabilities, seed_of


def test_each_image_gets_its_own_numbers_whatever_batch_it_is_in() -> None:
    together, alone = Draws([5, 6, 7]), Draws([6])
    assert torch.equal(together.normal(3, 4)[1], alone.normal(3, 4)[0])
    assert torch.equal(together.uniform(-1, 1, 2)[1], alone.uniform(-1, 1, 2)[0])
    assert torch.equal(together.integers(0, 9, 50)[1], alone.integers(0, 9, 50)[0])


def test_every_draw_is_a_new_one() -> None:
    draws = Draws([1])
    assert not torch.equal(draws.normal(8), draws.normal(8))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    Draws([1]).normal(100)
    assert torch.equal(torch.get_rng_state(), before)


def test_index_type_and_severity_all_change_the_seed() -> None:
    seeds = {seed_of(*key) for key in [(0, "fog", 1), (1, "fog", 1), (0, "snow", 1), (0, "fog", 2)]}
    assert len(seeds) == 4


@pytest.mark.parametrize("scale", [3, 60])
def test_columns_hold_exactly_the_probabilities(scale: int) -> None:
    share, other = (table.view(256, -1) for table in photon_columns(scale))
    found = share.clone().scatter_add_(1, other.long(), 1 - share) / (scale + 1)
    torch.testing.assert_close(found, photon_probabilities(scale), rtol=0, atol=1e-12)


def test_probabilities_are_poisson_s() -> None:
    found, rate = photon_probabilities(12)[100], 12 * 100 / 255
    for k in range(12):
        assert found[k] == pytest.approx(math.exp(-rate) * rate**k / math.factorial(k), abs=1e-12)
    assert found.sum() == pytest.approx(1)


def test_drawn_counts_have_the_mean_and_the_variance_of_their_rate() -> None:
    level = torch.full((1, 200_000), 51, dtype=torch.uint8)
    count = Draws([3]).poisson(level, 100).double()
    assert count.mean().item() == pytest.approx(20, abs=4 * (20 / 200_000) ** 0.5)
    assert count.var().item() == pytest.approx(20, rel=0.03)
