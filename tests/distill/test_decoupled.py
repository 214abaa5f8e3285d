"""Decoupled distillation against the official code, and what must be true of it."""

from __future__ import annotations

import pytest
import torch

from galago.distill.decoupled import decoupled_divergence
from galago.distill.logits import softened_divergence
from lessons import Golden, equal


def test_decoupled_distillation_is_classic_distillation_at_the_classic_weights() -> None:
    student, teacher = (torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    label, temperature = torch.arange(6) % 5, 3.0
    sure = (teacher / temperature).softmax(1)[torch.arange(6), label]
    whole = sum(
        decoupled_divergence(student[[i]], teacher[[i]], label[[i]], 1.0, float(1 - sure[i]), temperature)
        for i in range(6)
    )
    torch.testing.assert_close(whole / 6, softened_divergence(student, teacher, temperature))


def test_decoupled_distillation_by_loops() -> None:
    student, teacher = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    label, total = torch.tensor([2, 0, 3]), 0.0
    for i, y in enumerate(label.tolist()):
        own, its = (x[i].div(4).softmax(0) for x in (student, teacher))
        others = [k for k in range(4) if k != y]
        total += float(its[y] * (its[y] / own[y]).log() + (1 - its[y]) * ((1 - its[y]) / (1 - own[y])).log())
        q, p = own[others] / own[others].sum(), its[others] / its[others].sum()
        total += 8 * float((p * (p / q).log()).sum())
    found = decoupled_divergence(student, teacher, label, 1.0, 8.0, 4.0)
    assert found.item() == pytest.approx(16 * total / 3)


def test_decoupled_distillation_is_the_official_one() -> None:
    golden = Golden("dkd")
    own = golden.learnt("z_student")
    loss = decoupled_divergence(
        own, golden("z_teacher"), golden("y"), *(float(golden(n)) for n in ("alpha", "beta", "T"))
    )
    loss.backward()
    equal(loss, golden("expected_loss"))
    equal(own.grad, golden("grad_z_student"))
