"""Relational distillation against the official code, and what must be true of it."""

from __future__ import annotations

import torch

from galago.distill.relations import Relations, relational_distance
from lessons import Golden, equal, seen


def test_relations_are_the_official_ones() -> None:
    golden = Golden("rkd")
    for number, term in enumerate(("distance", "angle")):
        own = golden.learnt("f_student")
        loss = relational_distance(own, golden("f_teacher"))[number]
        loss.backward()
        equal(loss, golden(f"loss_{term}"))
        equal(own.grad, golden(f"grad_{term}"))
    equal(Relations()(seen([golden("f_student")], [golden("f_teacher")])), golden("expected_total"))


def test_a_far_embedding_meets_the_linear_part_of_hubers_loss() -> None:
    golden = Golden("rkd")
    own = golden.learnt("outlier_f_student")
    loss = relational_distance(own, golden("f_teacher"))[0]
    loss.backward()
    equal(loss, golden("outlier_loss_distance"))
    equal(own.grad, golden("outlier_grad_distance"))


def test_coinciding_embeddings_have_a_distance_of_nothing_and_no_direction() -> None:
    golden = Golden("rkd")
    for number, term in enumerate(("distance", "angle")):
        own = golden.learnt("f_student")
        loss = relational_distance(own, golden("duplicate_f_teacher"))[number]
        loss.backward()
        equal(loss, golden(f"duplicate_loss_{term}"), 1e-5)
        equal(own.grad, golden(f"duplicate_grad_{term}"), 1e-5)
    own = golden.learnt("dup_student_f")
    distance, angle = relational_distance(own, golden("f_teacher"))
    equal(distance, golden("dup_student_loss_distance"), 1e-5)
    equal(angle, golden("dup_student_loss_angle"), 1e-5)
    angle.backward()
    equal(own.grad, golden("dup_student_grad_angle_masked"))


def test_relations_do_not_see_rotation_scale_and_shift() -> None:
    own, its = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for one, other in zip(relational_distance(own, its), relational_distance(3 * own @ rotation + 2, its), strict=True):
        torch.testing.assert_close(one, other)


def test_a_single_image_has_no_relations() -> None:
    own = torch.randn(1, 4, requires_grad=True)
    assert Relations()(seen([own], [torch.randn(1, 3)], torch.zeros(1, 2))) == 0
