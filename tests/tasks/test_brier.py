"""The Brier loss against the golden value, a loop and the probe of the same name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.reliability import brier
from galago.tasks.brier import Brier, brier_loss
from galago.testing import check_task

GOLDEN = np.load(Path(__file__).parents[1] / "golden/regularization/rankmixup.npz")
TARGET = nn.functional.one_hot(torch.from_numpy(GOLDEN["loss_labels"]), 6).double()


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def scores() -> Tensor:
    return golden("loss_logits").clone().requires_grad_()


def test_loss_and_gradient_equal_the_golden_values() -> None:
    output = scores()
    loss = brier_loss(output, TARGET)
    torch.testing.assert_close(loss, golden("loss_brier"), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, golden("loss_brier_grad"), rtol=0, atol=1e-12)


def test_for_labels_it_is_the_number_that_the_probe_reports() -> None:
    reported = brier(golden("loss_logits").softmax(1), golden("loss_labels"))
    assert float(brier_loss(golden("loss_logits"), TARGET)) == pytest.approx(reported)


def test_it_agrees_with_a_loop_over_soft_targets() -> None:
    p, target = golden("loss_logits").softmax(1), 0.8 * TARGET + 0.2 / 6
    total = sum(float(p[b, k] - target[b, k]) ** 2 for b in range(16) for k in range(6))
    assert float(brier_loss(golden("loss_logits"), target)) == pytest.approx(total / 16)


def test_it_is_least_where_the_output_equals_the_target_and_two_where_all_is_wrong() -> None:
    target = torch.tensor([[0.7, 0.2, 0.1]])
    assert float(brier_loss(target.log(), target)) == pytest.approx(0, abs=1e-12)
    assert float(brier_loss(1e3 * torch.eye(3), torch.eye(3).roll(1, 0))) == pytest.approx(2)


def test_the_task_has_one_loss() -> None:
    batch = Batch(torch.zeros(16, 3, 4, 4), TARGET.float())
    assert float(Brier(6).losses(golden("loss_logits"), batch)["brier"]) == pytest.approx(float(GOLDEN["loss_brier"]))


def test_it_obeys_the_laws() -> None:
    batch = Batch(torch.zeros(12, 3, 8, 8), torch.eye(4).repeat(3, 1))
    output = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    check_task(lambda: Brier(4), batch, output, 9 * batch.target)
