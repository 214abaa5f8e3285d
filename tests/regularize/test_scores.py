"""What terms on class scores ask of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.regularize.scores import scores_and_targets


def after(output: Any, target: Any) -> Step:
    return Step(Batch(torch.zeros(2, 3, 4, 4), target), output, {})


def test_scores_and_targets_come_in_full_precision() -> None:
    scores, target = scores_and_targets(after(torch.ones(2, 3).bfloat16(), torch.eye(3)[:2].double()), "X")
    assert scores.dtype == target.dtype == torch.float32


def test_of_several_outputs_the_main_one_counts() -> None:
    output = {"main": torch.ones(2, 3), "branch": torch.zeros(2, 3)}
    assert torch.equal(scores_and_targets(after(output, torch.eye(3)[:2]), "X")[0], output["main"])


def test_another_number_of_outputs_than_classes_is_refused() -> None:
    with pytest.raises(UserError, match="X needs one output a class, but the model has 4 outputs for 3 classes"):
        scores_and_targets(after(torch.zeros(2, 4), torch.eye(3)[:2]), "X")


def test_targets_that_are_no_probabilities_are_refused() -> None:
    for target in (torch.tensor([0, 1]), torch.zeros(2), "boxes"):
        with pytest.raises(UserError, match="X needs class probabilities"):
            scores_and_targets(after(torch.zeros(2, 4), target), "X")
