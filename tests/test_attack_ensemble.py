"""APGD and its losses against the official code's numbers; the search against what it has to keep to."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.attack_ensemble import (
    apgd,
    checkpoints,
    cross_entropy,
    dlr,
    margin,
    side_of,
    square_search,
    targeted_dlr,
)
from galago.attacks import L2, Ball, Linf, pgd, whole_levels

GOLDEN = np.load(Path(__file__).parent / "golden" / "regularization" / "reliability_metrics_scores_attacks.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def golden_network(image: Tensor) -> Tensor:
    normalized = (image - golden("mean").view(3, 1, 1)) / golden("std").view(3, 1, 1)
    first = nn.functional.conv2d(normalized, golden("net_c1_weight"), golden("net_c1_bias"), padding=1).tanh()
    second = nn.functional.conv2d(first, golden("net_c2_weight"), golden("net_c2_bias"), stride=2).tanh()
    scores = nn.functional.linear(second.mean((2, 3)), golden("net_fc_weight"), golden("net_fc_bias"))
    return golden("head_scale") * scores


def linear_network(slopes: Tensor):
    """Two classes, of which the second grows with the slopes."""
    return lambda image: torch.stack([torch.zeros(len(image)), (image * slopes).flatten(1).sum(1)], 1)


def test_the_golden_network_is_the_one_that_was_attacked() -> None:
    torch.testing.assert_close(golden_network(golden("x")), golden("logits"), rtol=0, atol=1e-9)


def test_losses_are_those_of_the_official_code() -> None:
    scores, label = golden("logits"), golden("y").long()
    torch.testing.assert_close(cross_entropy(scores, label), golden("ce"), rtol=0, atol=1e-9)
    torch.testing.assert_close(dlr(scores, label), golden("dlr"), rtol=0, atol=1e-9)
    found = targeted_dlr(scores, label, golden("dlr_target").long())
    torch.testing.assert_close(found, golden("dlr_targeted"), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "loss"), [("ce", cross_entropy), ("dlr", dlr)])
def test_apgd_goes_where_the_official_code_goes(name: str, loss) -> None:
    ball, steps = Linf(float(golden("eps"))), int(golden("apgd_iterations"))
    found = apgd(golden("x"), golden("y").long(), golden_network, loss, ball, steps)
    torch.testing.assert_close(found.image, golden(f"x_apgd_{name}_best"), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.loss, golden(f"loss_apgd_{name}_best"), rtol=0, atol=1e-9)
    assert torch.equal(found.right, golden(f"still_correct_apgd_{name}").bool())


def test_dlr_does_not_change_when_scores_are_multiplied_or_shifted() -> None:
    scores, label = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 6
    torch.testing.assert_close(dlr(1000 * scores + 7, label), dlr(scores, label))
    aim = (label + 1) % 6
    torch.testing.assert_close(targeted_dlr(1000 * scores + 7, label, aim), targeted_dlr(scores, label, aim))


def test_losses_are_what_sorting_each_row_gives() -> None:
    scores, label = torch.randn(30, 5, dtype=torch.float64), torch.arange(30) % 5
    for row, own, one, distance in zip(scores.tolist(), label, dlr(scores, label), margin(scores, label), strict=True):
        ordered = sorted(row, reverse=True)
        rest = max(value for number, value in enumerate(row) if number != own)
        assert one.item() == pytest.approx(-(row[own] - rest) / (ordered[0] - ordered[2]))
        assert distance.item() == pytest.approx(row[own] - rest)


def test_equal_scores_give_no_infinite_loss() -> None:
    flat, label = torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 1])
    assert dlr(flat, label).isfinite().all()
    assert targeted_dlr(flat, label, 1 - label).isfinite().all()


def test_checkpoints_are_those_of_the_card() -> None:
    assert list(checkpoints(100).items())[:4] == [(22, 22), (41, 19), (57, 16), (70, 13)]
    assert list(checkpoints(50).items())[:3] == [(11, 11), (21, 10), (30, 9)]
    for steps in range(1, 120):
        found = checkpoints(steps)
        assert all(1 <= period <= at <= steps for at, period in found.items())
        assert min(found) == max(int(0.22 * steps), 1)


def test_apgd_is_at_least_as_strong_as_pgd_with_as_many_steps() -> None:
    ball, label = Linf(float(golden("eps"))), golden("y").long()

    def loss(image: Tensor) -> Tensor:
        return cross_entropy(golden_network(image), label)

    by_pgd = loss(pgd(golden("x"), loss, ball, ball.epsilon / 4, 20))
    found = apgd(golden("x"), label, golden_network, cross_entropy, ball, 20)
    assert (found.loss >= by_pgd - 1e-3).all()
    torch.testing.assert_close(found.loss, loss(found.image))


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.7)])
def test_apgd_stays_in_the_ball_and_finds_the_worst_image_of_a_linear_network(ball: Ball) -> None:
    torch.manual_seed(0)
    image, slopes = 0.4 + 0.2 * torch.rand(6, 3, 5, 4), torch.randn(3, 5, 4)
    label = torch.zeros(6, dtype=torch.long)
    found = apgd(image, label, linear_network(slopes), lambda scores, label: -margin(scores, label), ball, 30)
    torch.testing.assert_close(found.image, ball.project(found.image, image))
    step = ball.epsilon * ball.steepest(slopes.expand_as(image))
    torch.testing.assert_close(found.loss, linear_network(slopes)(image + step)[:, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.7)])
def test_starts_lie_at_the_edge_of_the_ball(ball: Ball) -> None:
    image = torch.full((50, 3, 5, 4), 0.5)
    change = ball.drawn_at_edge(image) - image
    size = change.abs().amax((1, 2, 3)) if isinstance(ball, Linf) else change.square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(size, torch.full((50,), ball.epsilon))
    assert (ball.drawn_at_edge(image.round()) >= 0).all()


def test_an_image_is_broken_if_any_iterate_was_even_if_the_last_is_not() -> None:
    """A network that is wrong in a narrow band only, which the attack crosses on its way to a higher loss."""

    def network(image: Tensor) -> Tensor:
        at = image.flatten(1).mean(1)
        wrong = ((at > 0.52) & (at < 0.58)).float()
        return torch.stack([1 - wrong, wrong], 1) + 0 * at[:, None]

    image, label = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    ball = Linf(0.2)

    def by_brightness(scores: Tensor, label: Tensor) -> Tensor:
        return scores.sum(1)

    assert apgd(image, label, network, by_brightness, ball, 5, start=image + 0.05).right.tolist() == [False, False]
    assert apgd(image, label, network, by_brightness, ball, 5, start=image + 0.15).right.tolist() == [True, True]


def test_the_search_keeps_to_whole_levels_within_the_ball() -> None:
    for ball, most in ((Linf(8 / 255), 8), (L2(0.7), None)):
        torch.manual_seed(0)
        image, seen = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8), []

        def network(shown: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(shown)
            return torch.eye(2)[torch.zeros(len(shown), dtype=torch.long)]

        assert square_search(image, torch.zeros(5, dtype=torch.long), network, ball, queries=60).all()
        assert len(seen) == 60
        changes = torch.stack([shown.int() - image for shown in seen])
        assert all(shown.dtype == torch.uint8 for shown in seen)
        if most is not None:
            assert changes.abs().max() == most
            assert (changes[1].abs() <= 8).all()
        else:
            assert (changes / 255).square().sum((2, 3, 4)).sqrt().max() <= 0.7 + 1e-4


def test_the_search_breaks_a_linear_network_without_its_gradient() -> None:
    torch.manual_seed(0)
    image, slopes = torch.randint(60, 200, (20, 3, 8, 8), dtype=torch.uint8), torch.randn(3, 8, 8)

    def network(shown: Tensor) -> Tensor:
        return torch.stack([torch.full((len(shown),), bound), (shown / 255 * slopes).flatten(1).sum(1)], 1)

    bound = 0.0
    level = network(image)[:, 1]
    for reach, broken in ((0.25, True), (1.05, False)):  # of what the whole ball allows
        bound = level.max().item() + reach * 0.1 * slopes.abs().sum().item()
        label = torch.zeros(20, dtype=torch.long)
        found = square_search(image, label, network, Linf(0.1), queries=400)
        assert (not found.all()) == broken


def test_what_a_network_gets_wrong_is_wrong_without_a_search() -> None:
    seen = []

    def network(shown: Tensor) -> Tensor:
        seen.append(len(shown))
        return torch.eye(3)[[0, 1, 2][: len(shown)]]

    image = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    found = square_search(image, torch.tensor([1, 2, 0]), network, Linf(0.1), queries=10)
    assert not found.any()
    assert seen == [3]


def test_squares_shrink_to_a_pixel_and_never_exceed_the_image() -> None:
    sides = [side_of(step / 500, 6, 90) for step in range(500)]
    assert sides == sorted(sides, reverse=True)
    assert max(sides) == 6
    assert side_of(0.99, 8, 8) == 1


def test_targets_lead_to_their_class() -> None:
    label = golden("logits").argmax(1)
    aim = (label + 2) % 5
    before = golden_network(golden("x")).gather(1, aim[:, None]) - golden_network(golden("x")).gather(1, label[:, None])
    found = apgd(golden("x"), label, golden_network, partial(targeted_dlr, aim=aim), Linf(0.1), 20).image
    after = golden_network(found).gather(1, aim[:, None]) - golden_network(found).gather(1, label[:, None])
    assert (after > before).all()


def test_rounding_towards_the_image_never_leaves_the_ball() -> None:
    image = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    ball = L2(0.5)
    shown = whole_levels(ball.drawn_at_edge(image / 255), image)
    assert ((shown / 255 - image / 255).square().sum((1, 2, 3)).sqrt() <= 0.5 + 1e-5).all()
