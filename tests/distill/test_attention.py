"""Attention transfer against the official code, and what must be true of it."""

from __future__ import annotations

import torch

from galago.distill.attention import Attention, attention, attention_distance
from lessons import Golden, equal, seen


def test_attention_transfer_is_the_official_one() -> None:
    golden = Golden("at")
    own = [golden.learnt(f"f_student_{tap}") for tap in range(3)]
    its = [golden(f"f_teacher_{tap}") for tap in range(3)]
    for tap in range(3):
        equal(attention_distance(own[tap], its[tap]), golden("loss_per_tap")[tap])
    loss = Attention()(seen(own, its))
    loss.backward()
    equal(loss, golden("expected_loss"))
    for tap in range(3):
        equal(own[tap].grad, golden(f"grad_f_student_{tap}"))
    equal(attention_distance(own[0], its[0], power=4.0), golden("p4_loss_tap0"))


def test_a_map_without_an_answer_has_no_attention_and_no_gradient() -> None:
    golden = Golden("at")
    own = golden.learnt("zero_sample_f_student")
    loss = attention_distance(own, golden("f_teacher_0"))
    loss.backward()
    equal(loss, golden("zero_sample_loss"))
    equal(own.grad, golden("zero_sample_grad"))
    assert not own.grad[0].any()


def test_attention_by_loops() -> None:
    feature = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for sample in range(2):
        places = [sum(feature[sample, c, i, j] ** 2 for c in range(3)) / 3 for i in range(2) for j in range(2)]
        length = sum(place**2 for place in places) ** 0.5
        torch.testing.assert_close(attention(feature)[sample], torch.stack([place / length for place in places]))
