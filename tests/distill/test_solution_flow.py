"""Flow of solution procedure against the official code, and what must be true of it."""

from __future__ import annotations

import pytest
import torch

from galago.distill.lesson import View
from galago.distill.solution_flow import SolutionFlow, flow_matrix
from galago.errors import UserError
from lessons import Golden, equal, seen


def test_flow_of_solution_is_the_official_one() -> None:
    golden = Golden("fsp")
    own = [golden.learnt(f"f_student_{tap}") for tap in range(4)]
    its = [golden(f"f_teacher_{tap}") for tap in range(4)]
    for pair in range(3):
        equal(flow_matrix(own[pair], own[pair + 1]), golden(f"gram_student_{pair}"))
    lesson = SolutionFlow(layers=["a", "b", "c", "d"])
    lesson.paths = lesson.teacher_paths = ["a", "b", "c", "d"]
    lesson.fit(View(own[0], own), View(its[0], its))
    assert not list(lesson.parameters())  # the same widths: nothing stands between
    loss = lesson(seen(own, its))
    loss.backward()
    equal(loss, golden("expected_loss"))
    for tap in range(4):
        equal(own[tap].grad, golden(f"grad_f_student_{tap}"))


def test_flow_grows_with_the_square_of_the_features() -> None:
    one, other = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    torch.testing.assert_close(flow_matrix(3 * one, 3 * other), 9 * flow_matrix(one, other))


def test_flow_needs_two_layers() -> None:
    with pytest.raises(UserError, match="at least two"):
        SolutionFlow(layers=["layer1"])
