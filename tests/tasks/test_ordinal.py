"""Grades: quadratic weighted kappa against golden values, torchmetrics, and cases that one can see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_cohen_kappa

from galago.batch import Batch
from galago.tasks.ordinal import Ordinal, expected_grade, quadratic_weighted_kappa
from galago.testing import check_task

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "slr.npz")
CASES = pytest.mark.parametrize("case", [0, 1, 2])


def kappa(answers: Tensor, grades: Tensor, classes: int) -> float:
    metrics, eye = Ordinal(classes).metrics(), torch.eye(classes)
    for part in torch.arange(len(grades)).split(7):
        metrics.update(eye[answers[part]], eye[grades[part]])
    return float(metrics.compute()["quadratic_weighted_kappa"])


@CASES
def test_kappa_of_a_confusion_matrix_is_the_golden_one(case: int) -> None:
    found = quadratic_weighted_kappa(torch.from_numpy(GOLDEN[f"qwk{case}_confusion"]))
    assert found.item() == pytest.approx(float(GOLDEN[f"qwk{case}_kappa"]), abs=1e-12)


@CASES
def test_kappa_of_answers_in_batches_is_the_golden_one_and_torchmetrics(case: int) -> None:
    grades, answers = (torch.from_numpy(GOLDEN[f"qwk{case}_{name}"]) for name in ("true", "pred"))
    classes = len(GOLDEN[f"qwk{case}_confusion"])
    expected = multiclass_cohen_kappa(answers, grades, classes, weights="quadratic").item()
    assert kappa(answers, grades, classes) == pytest.approx(float(GOLDEN[f"qwk{case}_kappa"]), abs=1e-6)
    assert kappa(answers, grades, classes) == pytest.approx(expected, abs=1e-6)


def test_kappa_is_the_one_on_the_card() -> None:
    confusion = torch.tensor([[5, 1, 0], [1, 3, 1], [0, 1, 4]])
    assert quadratic_weighted_kappa(confusion).item() == pytest.approx(0.817142857, abs=1e-9)


def test_perfect_answers_have_one_independent_ones_nothing_and_reversed_ones_less() -> None:
    grades = torch.arange(4).repeat_interleave(4)
    assert kappa(grades, grades, 4) == 1
    assert kappa(torch.arange(4).repeat(4), grades, 4) == pytest.approx(0, abs=1e-6)
    assert kappa(3 - grades, grades, 4) == pytest.approx(-1)


def test_where_all_is_one_class_kappa_says_whether_it_is_the_same() -> None:
    assert quadratic_weighted_kappa(torch.diag(torch.tensor([0, 7, 0]))).item() == 1
    assert kappa(torch.full((5,), 2), torch.full((5,), 2), 3) == 1
    assert kappa(torch.full((5,), 2), torch.full((5,), 0), 3) == 0
    assert quadratic_weighted_kappa(torch.zeros(3, 3)).item() == 1


def test_the_answer_is_the_expected_grade_rounded() -> None:
    probabilities = torch.tensor([[0.5, 0.0, 0.5], [0.51, 0.49, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert expected_grade(probabilities).tolist() == [1, 0, 1, 2]
    assert Ordinal(3).decisions(probabilities.clamp_min(1e-9).log()).tolist() == [1, 0, 1, 2]


def test_it_obeys_the_laws() -> None:
    batch = Batch(torch.zeros(12, 1, 4, 4), torch.eye(4)[torch.arange(12) % 4])
    output = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    check_task(lambda: Ordinal(4), batch, output, perfect=30 * batch.target)
