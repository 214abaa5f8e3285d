"""Paired intervals against a plain bootstrap, their coverage, and the trivial cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galago.errors import UserError
from galago.probes.paired import paired_difference


def answers(seed: int, images: int = 400, kept: float = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = (torch.rand(images, generator=generator) < 0.9).float()
    same = torch.rand(images, generator=generator) < kept
    return first, torch.where(same, first, (torch.rand(images, generator=generator) < 0.9).float())


def test_the_interval_equals_that_of_a_plain_bootstrap() -> None:
    first, second = answers(0)
    draws = np.random.default_rng(1)
    apart = (second - first).numpy()
    means = [apart[draws.integers(0, 400, 400)].mean() for _ in range(5000)]
    found = paired_difference(first, second, rounds=5000)
    assert found.difference == pytest.approx(apart.mean())
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.0026)


def test_losses_work_like_right_and_wrong() -> None:
    generator = torch.Generator().manual_seed(3)
    first = torch.rand(300, generator=generator)
    found = paired_difference(first, first + 0.1 + 0.01 * torch.randn(300, generator=generator))
    assert found.difference == pytest.approx(0.1, abs=0.002)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.01 / 300**0.5, rel=0.15)
    assert found.certain


def test_pairs_that_mostly_agree_give_a_narrower_interval_than_shuffled_ones() -> None:
    first, second = answers(4, images=2000)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    paired, shuffled = paired_difference(first, second), paired_difference(first, second[order])
    assert paired.difference == pytest.approx(shuffled.difference)
    assert (paired.high - paired.low) < 0.5 * (shuffled.high - shuffled.low)


def test_networks_that_are_equally_good_are_called_different_one_time_in_twenty() -> None:
    wrong = sum(paired_difference(*answers(seed, kept=0.5)).certain for seed in range(300))
    assert 4 <= wrong <= 30


def test_the_same_answers_differ_by_nothing() -> None:
    first, _ = answers(5)
    assert tuple(paired_difference(first, first)) == (0, 0, 0)
    assert not paired_difference(first, first).certain


def test_swapping_the_networks_turns_the_sign() -> None:
    first, second = answers(6)
    assert paired_difference(first, second).difference == -paired_difference(second, first).difference


def test_the_random_state_is_untouched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - the global state itself is meant
    paired_difference(*answers(7))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize(("first", "second"), [(torch.ones(3), torch.ones(4)), (torch.ones(0), torch.ones(0))])
def test_answers_to_other_images_are_refused(first: torch.Tensor, second: torch.Tensor) -> None:
    with pytest.raises(UserError, match="one number an image"):
        paired_difference(first, second)
