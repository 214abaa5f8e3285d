"""Selective errors and areas against the official routine, hand-computed cases and loops over coverages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from galago.errors import UserError
from galago.models.tiny import Tiny
from galago.probe import Outputs
from galago.probes.selective import COVERAGES, Selective, area, entropy, kept, risks, threshold, uncertainties
from galago.tasks.abstain import ClassifyOrAbstain
from galago.tasks.classify import Classify
from galago.testing import check_probe

GOLDEN = np.load(Path(__file__).parents[1] / "golden/distillation/kd_abstention.npz")
CONFIDENCE = torch.tensor([0.95, 0.9, 0.85, 0.8, 0.75, 0.65, 0.6, 0.55, 0.5, 0.45], dtype=torch.float64)
CORRECT = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 0])


def some(count: int = 200, outputs: int = 5, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(count, outputs, generator=generator)
    label = torch.randint(4, (count,), generator=generator)
    return Outputs(scores, torch.eye(4)[label])


def test_coverages_and_accuracies_are_those_of_the_official_routine() -> None:
    risk = risks(torch.from_numpy(GOLDEN["cov_reservation"]), torch.from_numpy(GOLDEN["cov_correct"]))
    assert GOLDEN["coverages_percent"].tolist() == list(COVERAGES)
    for coverage, realized, accuracy in zip(
        COVERAGES, GOLDEN["cov_realized"].tolist(), GOLDEN["cov_accuracy"].tolist(), strict=True
    ):
        number = kept(coverage, 45)
        assert number / 45 == pytest.approx(realized)
        assert 1 - risk[number - 1].item() == pytest.approx(accuracy)


def test_ten_confidences_give_the_values_of_the_card() -> None:
    risk = risks(1 - CONFIDENCE, CORRECT)
    expected = [0, 0, 0.3333, 0.25, 0.2, 0.1667, 0.2857, 0.375, 0.3333, 0.4]
    assert risk.tolist() == pytest.approx(expected, abs=5e-5)
    assert area(risk) == pytest.approx(0.234404762, abs=1e-9)
    perfect = risks(1 - CORRECT, CORRECT)
    assert area(perfect) == pytest.approx(0.112619048, abs=1e-9)


def test_a_perfect_ranking_and_a_random_one_have_the_areas_that_theory_says() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(20_000, generator=generator) < 0.3
    error = float(wrong.double().mean())
    assert area(risks(wrong, ~wrong)) == pytest.approx(error + (1 - error) * np.log(1 - error), abs=1e-3)
    assert area(risks(torch.rand(20_000, generator=generator), ~wrong)) == pytest.approx(error, abs=0.02)


def test_the_area_agrees_with_a_loop_over_coverages() -> None:
    generator = torch.Generator().manual_seed(1)
    uncertainty, correct = torch.rand(60, generator=generator), torch.rand(60, generator=generator) < 0.7
    order = sorted(range(60), key=lambda i: (float(uncertainty[i]), i))
    found = [np.mean([not correct[j] for j in order[: i + 1]]) for i in range(60)]
    assert risks(uncertainty, correct).tolist() == pytest.approx(found)
    assert area(risks(uncertainty, correct)) == pytest.approx(np.mean(found))


def test_equal_uncertainties_keep_the_order_of_the_images() -> None:
    assert risks(torch.zeros(4), torch.tensor([0, 1, 1, 0])).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])


@pytest.mark.parametrize("coverage", [10, 50, 75, 100])
def test_a_threshold_answers_as_many_images_as_were_wanted(coverage: int) -> None:
    uncertainty = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert int((uncertainty <= threshold(uncertainty, coverage)).sum()) == coverage * 40 // 100


def test_entropy_is_nothing_for_certainty_and_largest_for_ignorance() -> None:
    found = entropy(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    assert found.tolist() == pytest.approx([0, np.log(4)])


def test_with_a_reservation_the_other_rankings_are_of_the_classes_alone() -> None:
    outputs, task = some(), ClassifyOrAbstain(4)
    scores = outputs.output.double()
    found = uncertainties(task.decode(scores), task.reservation(scores))
    classes = scores[:, :4].softmax(1)
    torch.testing.assert_close(found["confidence"], 1 - classes.max(1).values)
    torch.testing.assert_close(found["entropy"], entropy(classes))
    torch.testing.assert_close(found["reservation"], scores.softmax(1)[:, 4])


def test_at_full_coverage_every_ranking_gives_the_error_rate() -> None:
    for task, outputs in ((ClassifyOrAbstain(4), some()), (Classify(4), some(outputs=4))):
        numbers = Selective([100]).score(outputs, task)
        right = task.decisions(outputs.output) == outputs.target.argmax(1)
        full = [value for name, value in numbers.items() if name.startswith("selective_error_100")]
        assert full == pytest.approx([1 - float(right.double().mean())] * len(full))


def test_a_task_that_always_answers_is_ranked_in_two_ways_and_a_gambler_in_three() -> None:
    names = Selective([90, 50]).score(some(outputs=4), Classify(4)).keys()
    assert names == {
        f"{what}_{by}"
        for what in ("aurc", "selective_error_90", "selective_error_50")
        for by in ("confidence", "entropy")
    }
    gambler = Selective().score(some(), ClassifyOrAbstain(4))
    assert len(gambler) == 3 * (len(COVERAGES) + 1)
    assert "selective_error_97_reservation" in gambler


def test_a_reservation_that_knows_its_errors_has_the_least_area() -> None:
    outputs, task = some(400), ClassifyOrAbstain(4)
    wrong = task.decisions(outputs.output) != outputs.target.argmax(1)
    outputs.output[:, 4] = torch.where(wrong, 9.0, -9.0)
    numbers = Selective().score(outputs, task)
    assert numbers["aurc_reservation"] < min(numbers["aurc_confidence"], numbers["aurc_entropy"])
    assert numbers["selective_error_20_reservation"] == 0


def test_an_answer_that_is_all_reservation_still_has_numbers() -> None:
    scores = torch.zeros(3, 5)
    scores[:, 4] = 5000.0
    numbers = Selective().score(Outputs(scores, torch.eye(4)[:3]), ClassifyOrAbstain(4))
    assert all(np.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize("coverage", [0, -5, 101])
def test_a_coverage_that_is_no_percentage_is_refused(coverage: int) -> None:
    with pytest.raises(UserError, match=f"coverages has {coverage}"):
        Selective([50, coverage])


def test_the_laws_of_probes_hold_for_a_classifier_and_for_a_gambler() -> None:
    check_probe(Selective)
    check_probe(
        Selective, make_model=lambda: Tiny(classes=4, channels=3, width=5), make_task=lambda: ClassifyOrAbstain(3)
    )
