"""Accuracy of single and averaged answers, and how far answers disagree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.distill.noise_injection import NoiseInjection
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.probe import Deployed
from galago.probes.draws import Draws
from galago.testing import check_probe
from noise import trained_network


class Turns(nn.Module):
    """Right about everything in its first answer, wrong in its second, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        batch, data = (self.passes - 1) % 6, TinyImages()
        target = data.validation()[batch].target
        wrong = (self.passes - 1) // 6 % 2 == 1
        return 2 * (target.roll(1, 1) if wrong else target)


def measured(network: nn.Module, draws: int) -> dict[str, float]:
    data = TinyImages()
    return Draws(draws)(Deployed(network, data.normalize, classify()), classify(), data)


def test_numbers_are_those_of_a_network_that_is_right_every_other_time() -> None:
    found = measured(Turns(), 4)
    assert found["draws_accuracy_mean"] == 0.5
    assert found["draws_accuracy_std"] == 0.5
    right = torch.tensor([2.0, 0.0, 0.0]).softmax(0)
    mean = (right + right.roll(1)) / 2
    assert found["draws_entropy"] == pytest.approx(float(-(mean * mean.log()).sum()))
    assert found["draws_variance"] == pytest.approx(float((right - mean).square().sum()))


def test_a_network_without_noise_says_the_same_each_time() -> None:
    found = measured(trained_network(), 3)
    assert found["draws_accuracy_std"] == found["draws_variance"] == 0
    assert found["draws_accuracy_mean"] == found["draws_accuracy"]
    assert found["draws_entropy"] > 0


def test_more_noise_is_more_doubt() -> None:
    found = [
        measured(NoiseInjection(alpha).prepare(trained_network(), TinyImages()), 8)["draws_variance"]
        for alpha in (0.1, 0.5, 2.0)
    ]
    assert found == sorted(found)
    assert found[0] > 0


def test_it_obeys_the_laws_with_and_without_noise() -> None:
    check_probe(lambda: Draws(3))
    check_probe(
        lambda: Draws(3), lambda: NoiseInjection().prepare(tiny_network(), TinyImages()), same_on_artifact=False
    )


def test_no_draw_is_refused() -> None:
    with pytest.raises(UserError, match="draws is 0"):
        Draws(0)
