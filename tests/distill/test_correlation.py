"""Distillation by correlation against the official code, and what must be true of it."""

from __future__ import annotations

import torch

from galago.distill.correlation import uncorrelated
from lessons import Golden, equal


def test_scores_are_correlated_with_themselves_and_not_with_their_opposite() -> None:
    scores = torch.randn(6, 4, dtype=torch.float64)
    assert uncorrelated(scores, scores, 1.0, 1.0, 1.0).abs() < 1e-6
    assert uncorrelated(-scores, scores, 1.0, 1.0, 1.0) > 1


def test_correlation_is_the_official_one() -> None:
    golden = Golden("dist")
    weights = float(golden("beta")), float(golden("gamma"))
    for temperature, value, gradient in ((1.0, "expected_loss", "grad_z_student"), (4.0, "loss_tau", "grad_tau")):
        own = golden.learnt("z_student")
        loss = uncorrelated(own, golden("z_teacher"), *weights, temperature)
        loss.backward()
        equal(loss, golden(value))
        equal(own.grad, golden(gradient))
