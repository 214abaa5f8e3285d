"""Similarity-preserving distillation against the official code, and what must be true of it."""

from __future__ import annotations

import torch

from galago.distill.similarity import Similarity, similarity_distance
from lessons import Golden, equal, seen


def test_similarity_is_the_official_one() -> None:
    golden = Golden("sp")
    own = golden.learnt("f_student")
    loss = Similarity()(seen([own], [golden("f_teacher")]))
    loss.backward()
    equal(loss, golden("expected_loss"))
    equal(own.grad, golden("grad_f_student"))


def test_an_image_without_features_is_similar_to_none_and_has_no_gradient() -> None:
    golden = Golden("sp")
    own = golden.learnt("zero_sample_f_student")
    loss = similarity_distance(own, golden("f_teacher"))
    loss.backward()
    equal(loss, golden("zero_sample_loss"))
    equal(own.grad, golden("zero_sample_grad_masked"))


def test_similarity_changes_when_features_are_moved() -> None:
    own, its = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert not torch.isclose(similarity_distance(own + 1, its), similarity_distance(own, its))
