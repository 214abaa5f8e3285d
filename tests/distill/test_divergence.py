"""The shared divergence against the official numbers of FFL, and with and without its shift."""

from __future__ import annotations

import math

import torch

from galago.distill.divergence import SHIFT, softened_divergence
from lessons import Golden, equal

GOLDEN = Golden("ffl", prefix="")


def test_the_shifted_divergence_and_its_gradient_are_the_official_ones() -> None:
    temperature, fused = float(GOLDEN("T")), GOLDEN("zf")
    for number in (1, 2):
        scores = GOLDEN.learnt(f"z{number}")
        loss = softened_divergence(scores, fused, temperature, SHIFT)
        loss.backward()
        equal(loss, GOLDEN(f"kl_z{number}_from_zf"))
    first = GOLDEN.learnt("z1")
    softened_divergence(first, fused, temperature, SHIFT).backward()
    equal(first.grad, GOLDEN("grad_kl_z1"))


def test_the_divergence_is_the_sum_written_out_element_by_element() -> None:
    student, teacher, temperature = GOLDEN("z1"), GOLDEN("z2"), 2.5
    total = 0.0
    for own, its in zip((student / temperature).tolist(), (teacher / temperature).tolist(), strict=True):
        p, q = (torch.tensor(row, dtype=torch.float64).softmax(0).tolist() for row in (own, its))
        total += sum((b + SHIFT) * math.log((b + SHIFT) / a) for a, b in zip(p, q, strict=True))
    expected = torch.tensor(total / len(student) * temperature**2, dtype=torch.float64)
    equal(softened_divergence(student, teacher, temperature, SHIFT), expected)


def test_at_agreement_the_shift_leaves_a_little_and_without_it_nothing_is_left() -> None:
    scores, temperature = GOLDEN.learnt("agree_z"), float(GOLDEN("T"))
    loss = softened_divergence(scores, scores, temperature, SHIFT)
    equal(loss, GOLDEN("agree_kl"), 1e-6)
    classes = scores.shape[1]
    assert abs(loss.item() - temperature**2 * classes * SHIFT) < 1e-9
    loss.backward()
    assert scores.grad.abs().max() < temperature / len(scores) * (classes + 1) * SHIFT
    plain = GOLDEN.learnt("agree_z")
    loss = softened_divergence(plain, plain, temperature)
    loss.backward()
    assert loss.abs() < 1e-15
    assert plain.grad.abs().max() < 1e-15


def test_the_target_gets_no_gradient_and_the_student_the_difference_of_probabilities() -> None:
    student, teacher = GOLDEN.learnt("z1"), GOLDEN.learnt("zf")
    softened_divergence(student, teacher, 3.0, SHIFT).backward()
    assert teacher.grad is None
    p, q = ((scores.detach() / 3).softmax(1) for scores in (student, teacher))
    assert (student.grad - 3 / len(p) * (p - q)).abs().max() <= 3 / len(p) * p.shape[1] * SHIFT
