"""What is true of every lesson."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from galago.batch import Batch
from galago.distill.attention import Attention
from galago.distill.correlation import Correlation
from galago.distill.decoupled import Decoupled
from galago.distill.lesson import Lesson, Seen, View
from galago.distill.logits import SoftTargets
from galago.distill.relations import Relations
from galago.distill.similarity import Similarity
from galago.distill.solution_flow import SolutionFlow
from galago.errors import UserError
from lessons import seen

ON_FEATURES: list[Callable[[], Lesson]] = [Attention, Similarity, Relations, SolutionFlow]
ON_SCORES: list[Callable[[], Lesson]] = [SoftTargets, Decoupled, Correlation]


@pytest.mark.parametrize("make", [*ON_FEATURES, *ON_SCORES])
def test_a_model_that_is_its_teacher_has_nothing_to_learn(make: Callable[[], Lesson]) -> None:
    lesson = make()
    features = [torch.randn(4, 3, size, size, dtype=torch.float64) for size in (8, 4, 2)]
    scores = torch.randn(4, 5, dtype=torch.float64)
    features = features[-len(lesson.layers) :] if lesson.layers else []
    lesson.paths = lesson.teacher_paths = [str(layer) for layer in lesson.layers]
    view = View(scores, features)
    lesson.fit(view, view)
    assert (
        lesson(Seen(view, view, Batch(scores, scores.softmax(1)), 0.0)).abs() < 1e-5
    )  # correlation divides by a little more than the lengths


@pytest.mark.parametrize("make", [Attention, Similarity])
def test_the_scale_of_features_does_not_matter(make: Callable[[], Lesson]) -> None:
    own, its = (torch.randn(4, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    lesson = make()
    torch.testing.assert_close(lesson(seen([own], [its])), lesson(seen([7 * own], [its])))


@pytest.mark.parametrize("make", [SoftTargets, Decoupled, Correlation])
def test_a_temperature_that_is_not_positive_is_refused(make: Callable[..., Lesson]) -> None:
    with pytest.raises(UserError, match="temperature"):
        make(temperature=0.0)


def test_layers_come_in_pairs() -> None:
    with pytest.raises(UserError, match="2 layers of the model are to be compared with 1"):
        Attention(layers=["a", "b"], teacher_layers=["c"])


def test_what_has_no_height_and_width_cannot_be_attended_to() -> None:
    lesson = Attention(layers=["head"])
    lesson.paths = lesson.teacher_paths = ["head"]
    flat = torch.zeros(1, 5)
    with pytest.raises(UserError, match=r"layer 'head' of the model gives 1×5"):
        lesson.fit(View(flat, [flat]), View(flat, [flat]))
    assert isinstance(lesson, nn.Module)
