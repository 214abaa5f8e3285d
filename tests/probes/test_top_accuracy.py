"""Top-k accuracy."""

from __future__ import annotations

import pytest
import torch

from galago.errors import UserError
from galago.probe import Outputs
from galago.probes.top_accuracy import TopAccuracy, among_top
from galago.tasks.classify import Classify
from galago.testing import check_probe

SCORES = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [0.0, 0.0, 1.0]])
TARGET = torch.eye(3)[[0, 1, 2, 2]]


def test_top_one_is_the_share_of_right_answers() -> None:
    assert TopAccuracy(1).score(Outputs(SCORES, TARGET), Classify(3)) == {"top1_accuracy": 0.5}


def test_top_two_counts_the_second_guess() -> None:
    assert TopAccuracy(2).score(Outputs(SCORES, TARGET), Classify(3)) == {"top2_accuracy": 0.75}


def test_top_k_equals_torch_topk_without_ties() -> None:
    scores = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    label = torch.arange(200) % 10
    expected = (scores.topk(3, 1).indices == label[:, None]).any(1).double().mean()
    assert among_top(scores, torch.eye(10)[label], 3) == pytest.approx(float(expected))


def test_a_constant_output_is_right_only_for_the_first_class() -> None:
    outputs = Outputs(torch.zeros(30, 3), torch.eye(3).repeat(10, 1))
    assert TopAccuracy(1).score(outputs, Classify(3)) == pytest.approx({"top1_accuracy": 1 / 3})


def test_no_guesses_is_refused_with_advice() -> None:
    with pytest.raises(UserError, match="k is 0"):
        TopAccuracy(0)


def test_the_laws_of_probes_hold() -> None:
    check_probe(lambda: TopAccuracy(2))
