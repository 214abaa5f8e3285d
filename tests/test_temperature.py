"""The fitted temperature against golden vectors, searches over many, and what must be so by its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.reliability import answers, reliability
from galago.temperature import fit_temperature, grid_temperature

GOLDEN = np.load(Path(__file__).parent / "golden/regularization/reliability_metrics_calibration.npz")
LOGITS, LABELS = torch.from_numpy(GOLDEN["logits"]), torch.from_numpy(GOLDEN["labels"])


def drawn(images: int = 20_000, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Scores, and labels drawn from what they say."""
    generator = torch.Generator().manual_seed(2)
    scores = 2 * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    return scores, torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]


def likelihood(scores: Tensor, target: Tensor, temperature: float) -> float:
    return float(nn.functional.cross_entropy(scores.double() / temperature, target))


def test_the_likeliest_temperature_equals_the_golden_one() -> None:
    assert fit_temperature(LOGITS, LABELS) == pytest.approx(float(GOLDEN["expected_temperature_nll"]), abs=1e-4)


def test_the_temperature_of_the_grid_and_its_error_equal_the_golden_ones() -> None:
    found = grid_temperature(LOGITS, LABELS)
    assert found == float(GOLDEN["expected_temperature_ece_grid"])
    diagram = reliability(*answers((LOGITS.double() / found).softmax(1), LABELS.long()))
    assert diagram.expected_error() == pytest.approx(float(GOLDEN["expected_ece15_at_grid_temperature"]), abs=1e-9)


def test_no_other_temperature_is_likelier() -> None:
    found = fit_temperature(LOGITS, LABELS)
    best = likelihood(LOGITS, LABELS.long(), found)
    for other in [*torch.linspace(-3, 3, 121).exp().tolist(), found * 1.001, found / 1.001]:
        assert likelihood(LOGITS, LABELS.long(), other) >= best


def test_labels_drawn_from_the_scores_need_no_temperature() -> None:
    scores, label = drawn()
    assert fit_temperature(scores, label) == pytest.approx(1, abs=0.03)
    assert grid_temperature(scores, label) == pytest.approx(1, abs=0.11)


def test_scores_three_times_as_large_need_three_times_the_temperature_and_are_as_likely_then() -> None:
    scores, label = drawn(2000)
    first, second = fit_temperature(scores, label), fit_temperature(3 * scores, label)
    assert second == pytest.approx(3 * first, rel=1e-6)
    assert likelihood(3 * scores, label, second) == pytest.approx(likelihood(scores, label, first), abs=1e-12)


def test_a_number_added_to_all_scores_of_an_image_changes_nothing() -> None:
    scores, label = drawn(500)
    shift = 1e3 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fit_temperature(scores + shift, label) == pytest.approx(fit_temperature(scores, label), rel=1e-6)


def test_targets_may_be_labels_or_the_probabilities_that_say_the_same() -> None:
    scores, label = drawn(500)
    target = nn.functional.one_hot(label, 5).float()
    assert fit_temperature(scores, target) == fit_temperature(scores, label)
    assert grid_temperature(scores, target) == grid_temperature(scores, label)


def test_soft_targets_are_met_exactly_where_a_temperature_can() -> None:
    scores, _ = drawn(500)
    assert fit_temperature(scores, (scores / 1.7).softmax(1)) == pytest.approx(1.7, rel=1e-6)


def test_a_network_that_is_always_right_gets_the_lowest_temperature_and_one_that_knows_nothing_the_highest() -> None:
    target = torch.eye(4)
    assert fit_temperature(5 * target, target) == pytest.approx(0.05)
    assert fit_temperature(5 * target, target.roll(1, 0)) == pytest.approx(20)
    assert grid_temperature(50 * target, target) == 0.1  # all the same: the smallest of the grid


def test_a_temperature_that_changes_nothing_is_one() -> None:
    assert fit_temperature(torch.full((3, 4), 0.1), torch.tensor([0, 1, 2])) == 1


def test_one_class_of_data_and_equal_predictions_have_an_answer() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0]]).repeat(30, 1)
    assert fit_temperature(scores, torch.zeros(30).long()) == pytest.approx(0.05)
    assert fit_temperature(scores, torch.arange(30) % 3) == pytest.approx(20)
    assert fit_temperature(scores[:1], scores[:1].softmax(1)) == pytest.approx(1, rel=1e-6)


WRONG = {
    "scores are not finite": (torch.full((2, 3), torch.nan), torch.tensor([0, 1])),
    "no images": (torch.zeros(0, 3), torch.zeros(0, 3)),
    "scores N×K and N targets": (torch.zeros(2, 3), torch.tensor([0])),
    "from 0 to 3, but there are scores of 3 classes": (torch.zeros(2, 3), torch.tensor([0, 3])),
    "targets are 2×4, but scores are 2×3": (torch.zeros(2, 3), torch.eye(4)[:2]),
    "no class probabilities": (torch.zeros(2, 3), torch.ones(2, 3)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_inputs_are_refused_in_words(message: str) -> None:
    for fit in (fit_temperature, grid_temperature):
        with pytest.raises(UserError, match=message):
            fit(*WRONG[message])
