"""FGSM and PGD against published numbers, against loops, and against what every attack has to keep to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn

from galago.attacks import L2, Ball, Linf, against, fgsm, gradient, length, pgd, worst
from galago.errors import UserError
from noise import attacked_network, golden

BALLS = [Linf(0.1), L2(0.7)]


def one_hot() -> Tensor:
    return nn.functional.one_hot(golden("atk_y"), 4).double()


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 5, 4, dtype=torch.float64)


def slope(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss whose gradient is the same everywhere."""
    return lambda image: (image * weight).flatten(1).sum(1)


def test_both_attacks_are_those_of_the_official_code() -> None:
    loss, ball = against(attacked_network(), one_hot()), Linf(float(golden("atk_eps")))
    torch.testing.assert_close(fgsm(golden("atk_x"), loss, ball), golden("atk_fgsm"), rtol=0, atol=1e-9)
    found = pgd(golden("atk_x"), loss, ball, float(golden("atk_step")), int(golden("atk_steps")))
    torch.testing.assert_close(found, golden("atk_pgd"), rtol=0, atol=1e-9)


def test_the_loss_is_the_cross_entropy_of_each_image_alone() -> None:
    network, image = attacked_network(), golden("atk_x")
    losses = against(lambda seen: {"main": network(seen), "side": seen}, one_hot())(image)
    for number, label in enumerate(golden("atk_y")):
        torch.testing.assert_close(losses[number], -network(image[[number]]).log_softmax(1)[0, label])


def by_hand(image: Tensor, slopes: Tensor, ball: Ball, step: float, steps: int) -> Tensor:
    """PGD on a linear loss, image by image and, for the maximum norm, value by value."""
    found = image.clone()
    for number in range(len(image)):
        for _ in range(steps):
            if isinstance(ball, Linf):
                for place in torch.cartesian_prod(*map(torch.arange, image.shape[1:])):
                    at = (number, *place.tolist())
                    moved = found[at] + step * slopes[at].sign()
                    found[at] = moved.clamp(image[at] - ball.epsilon, image[at] + ball.epsilon).clamp(0, 1)
            else:
                change = found[number] + step * slopes[number] / slopes[number].norm() - image[number]
                change = change * min(1.0, ball.epsilon / change.norm().item())
                found[number] = (image[number] + change).clamp(0, 1)
    return found


@pytest.mark.parametrize("ball", BALLS)
def test_pgd_is_what_a_loop_over_images_gives(ball: Ball) -> None:
    image, slopes = images(), torch.randn(6, 3, 5, 4, dtype=torch.float64)
    found = pgd(image, slope(slopes), ball, step=0.06, steps=3)
    torch.testing.assert_close(found, by_hand(image, slopes, ball, 0.06, 3))


@pytest.mark.parametrize("ball", BALLS)
def test_fgsm_is_one_step_of_pgd_as_long_as_the_radius(ball: Ball) -> None:
    image, loss = images(), slope(torch.randn(6, 3, 5, 4, dtype=torch.float64))
    assert torch.equal(fgsm(image, loss, ball), pgd(image, loss, ball, ball.epsilon, 1))


@pytest.mark.parametrize("ball", BALLS)
def test_attacked_images_stay_in_the_ball_and_are_images(ball: Ball) -> None:
    image = images(32).round()  # many pixels lie on the border of [0, 1]
    loss = against(nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).double(), torch.eye(3).double()[torch.arange(32) % 3])
    for found in (fgsm(image, loss, ball), pgd(image, loss, ball, 0.3, 5, start=ball.drawn(image)), ball.drawn(image)):
        change = found - image
        size = length(change) if isinstance(ball, L2) else change.abs()
        assert size.max() <= ball.epsilon + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
        assert not torch.equal(found, image)


def test_random_starts_are_spread_evenly_over_the_ball() -> None:
    center = torch.full((20_000, 1, 1, 2), 0.5)
    inside = length(L2(0.3).drawn(center) - center) < 0.15
    assert abs(inside.float().mean() - 0.25) < 0.01  # half the radius, a quarter of the area
    assert abs((Linf(0.3).drawn(center) - center).abs().mean() - 0.15) < 0.003


def test_a_gradient_of_zero_moves_nothing() -> None:
    image = images()
    for ball in BALLS:
        assert torch.equal(pgd(image, lambda seen: 0 * seen.flatten(1).sum(1), ball, 0.1, 2), image)


def test_gradients_are_averaged_over_draws_of_the_noise() -> None:
    slopes = [torch.randn(6, 3, 5, 4, dtype=torch.float64) for _ in range(3)]
    drawn: Iterator[Tensor] = cycle(slopes)
    found = gradient(lambda image: slope(next(drawn))(image), images(), draws=3)
    torch.testing.assert_close(found, torch.stack(slopes).mean(0))


def test_attacking_leaves_no_gradient_in_the_network_nor_in_the_images() -> None:
    network, image = attacked_network(), golden("atk_x").clone().requires_grad_()
    with torch.no_grad():
        found = pgd(image, against(network, one_hot()), Linf(0.1), 0.05, 2)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert image.grad is None
    assert not found.requires_grad


def test_of_several_attacks_each_image_gets_the_worst_on_average() -> None:
    candidates = [torch.full((3, 1, 1, 1), value) for value in (0.2, 0.9, 0.5)]
    wanted = torch.tensor([0.9, 0.5, 0.2])
    luck = cycle([0.0, 3.0])

    def loss(image: Tensor) -> Tensor:
        return -(image.flatten() - wanted).abs() + next(luck)

    assert torch.equal(worst(candidates, loss, draws=2).flatten(), wanted)


def test_more_room_means_more_success_and_all_of_it_at_last() -> None:
    torch.manual_seed(1)
    network, image = nn.Sequential(nn.Flatten(), nn.Linear(60, 16), nn.ReLU(), nn.Linear(16, 4)).double(), images(64)
    said = network(image).argmax(1)
    loss = against(network, nn.functional.one_hot(said, 4).double())
    fooled = []
    for epsilon in (0.01, 0.05, 0.2, 1.0):
        found = pgd(image, loss, Linf(epsilon), epsilon / 4, 10)
        fooled.append((network(found).argmax(1) != said).double().mean().item())
    assert fooled == sorted(fooled)
    assert fooled[0] < 0.5
    assert fooled[-1] == 1


def test_a_ball_without_a_radius_is_refused() -> None:
    with pytest.raises(UserError, match="Linf: epsilon is 0"):
        Linf(0.0)
    with pytest.raises(UserError, match="L2: epsilon is -1"):
        L2(-1.0)


def test_a_ball_is_named_by_norm_and_radius() -> None:
    assert (Linf().name, L2().name) == ("linf_0.0314", "l2_0.5")
