"""Several draws of one network's noise: golden numbers, loops, and the mean answer as a network of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from galago.draws import MeanOfDraws, entropy, log_mean_probability, variance
from galago.errors import UserError
from noise import golden


class Shaken(nn.Module):
    """Scores with noise on each."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * torch.randn_like(x)


def test_mean_and_both_measures_of_doubt_are_the_golden_ones() -> None:
    scores = golden("draw_logits")
    torch.testing.assert_close(log_mean_probability(scores).exp(), golden("draw_mean_prob"))
    torch.testing.assert_close(entropy(scores), golden("draw_entropy"))
    torch.testing.assert_close(variance(scores), golden("draw_variance"))


def test_they_are_what_a_loop_over_draws_gives() -> None:
    scores = 3 * torch.randn(4, 5, 3, dtype=torch.float64)
    for image in range(5):
        probabilities = [scores[draw, image].softmax(0) for draw in range(4)]
        mean = sum(probabilities) / 4
        doubt = -sum(float(p) * math.log(float(p)) for p in mean)
        apart = sum(float(((p - mean) ** 2).sum()) for p in probabilities) / 4
        assert entropy(scores)[image].item() == pytest.approx(doubt)
        assert variance(scores)[image].item() == pytest.approx(apart)


def test_a_score_far_below_the_others_leaves_everything_finite() -> None:
    scores = torch.tensor([[[0.0, -1e4]], [[0.0, -2e4]]])
    assert log_mean_probability(scores).isfinite().all()
    assert entropy(scores).item() == 0
    assert variance(scores).item() == 0


def test_the_mean_of_a_network_without_noise_is_what_it_says() -> None:
    x = torch.randn(5, 3)
    found = MeanOfDraws(nn.Identity(), 4)(x)
    torch.testing.assert_close(found.softmax(1), x.softmax(1))


def test_the_mean_of_many_draws_varies_less_than_one() -> None:
    x = torch.zeros(500, 3)
    single, many = (MeanOfDraws(Shaken(), draws)(x).softmax(1).std() for draws in (1, 25))
    assert 3 < single / many < 7


def test_an_output_with_auxiliary_heads_is_judged_by_its_main_one() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"main": x, "side": -x}

    x = torch.randn(5, 3)
    assert torch.equal(MeanOfDraws(Heads(), 2)(x), MeanOfDraws(nn.Identity(), 2)(x))


def test_the_mean_is_exported_for_any_number_of_images() -> None:
    mean, batch = MeanOfDraws(nn.Linear(4, 3), 3), torch.export.Dim("batch")
    program = torch.export.export(mean, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 5):
        x = torch.randn(count, 4)
        torch.testing.assert_close(program(x), mean(x))


def test_no_draw_is_refused() -> None:
    with pytest.raises(UserError, match="draws is 0"):
        MeanOfDraws(nn.Identity(), 0)
