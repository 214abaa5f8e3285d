"""Focal losses against the released code's numbers, loops, and what must be so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.tasks.classify import Classify
from galago.tasks.focal import Focal, SampleDependentFocal, focal_loss, powers
from galago.testing import check_task

GOLDEN = np.load(Path(__file__).parents[1] / "golden/regularization/rankmixup.npz")
TARGET = nn.functional.one_hot(torch.from_numpy(GOLDEN["loss_labels"]), 6).double()


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def scores() -> Tensor:
    return golden("loss_logits").clone().requires_grad_()


def test_loss_and_gradient_equal_the_golden_values() -> None:
    output = scores()
    loss = focal_loss(output, TARGET, 3.0)
    torch.testing.assert_close(loss, golden("loss_focal_gamma3"), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, golden("loss_focal_gamma3_grad"), rtol=0, atol=1e-12)


def test_the_sample_dependent_loss_and_gradient_equal_the_golden_values() -> None:
    output = scores()
    loss = focal_loss(output, TARGET, powers(output, 5.0, 3.0, 0.2))
    torch.testing.assert_close(loss, golden("loss_flsd53"), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, golden("loss_flsd53_grad"), rtol=0, atol=1e-12)


def test_the_tasks_lose_what_the_golden_file_says() -> None:
    batch = Batch(torch.zeros(16, 3, 4, 4), TARGET.float())
    for task, name in ((Focal(6), "loss_focal_gamma3"), (SampleDependentFocal(6), "loss_flsd53")):
        (loss,) = task.losses(golden("loss_logits"), batch).values()
        assert float(loss) == pytest.approx(float(GOLDEN[name]), abs=1e-6)


def test_soft_targets_weigh_the_classes_as_a_loop_does() -> None:
    target, p = torch.tensor([[0.7, 0.3, 0.0]]), torch.tensor([[0.5, 0.1, 0.4]])
    fixed = sum(-q * (1 - v) ** 3 * np.log(v) for q, v in zip([0.7, 0.3], [0.5, 0.1], strict=True))
    assert float(focal_loss(p.log(), target, 3.0)) == pytest.approx(fixed, abs=1e-6)
    varied = -0.7 * 0.5**3 * np.log(0.5) - 0.3 * 0.9**5 * np.log(0.1)
    assert float(focal_loss(p.log(), target, powers(p.log(), 5.0, 3.0, 0.2))) == pytest.approx(varied, abs=1e-6)


@pytest.mark.parametrize("target", [TARGET, 0.9 * TARGET + 0.1 / 6])
def test_power_zero_is_the_cross_entropy(target: Tensor) -> None:
    output = scores()
    plain, focal = nn.functional.cross_entropy(output, target), focal_loss(output, target, 0.0)
    torch.testing.assert_close(focal, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, output)[0] for loss in (focal, plain)))


def test_a_larger_power_costs_less_and_most_so_where_the_network_is_sure() -> None:
    sure, unsure = torch.tensor([[3.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    target = torch.eye(2)[:1]
    shares = [float(focal_loss(z, target, 3.0) / focal_loss(z, target, 0.0)) for z in (sure, unsure)]
    assert shares[0] < shares[1] < 1


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_the_gradient_is_finite_where_the_network_is_quite_sure_or_quite_wrong(gamma: float) -> None:
    output = torch.tensor([[200.0, 0, 0], [0, 0, 200.0]], requires_grad=True)
    loss = focal_loss(output, torch.eye(3)[[0, 0]], gamma)
    (gradient,) = torch.autograd.grad(loss, output)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_only_the_training_loss_differs_from_plain_classification() -> None:
    output = golden("loss_logits")
    assert torch.equal(Focal(6).decode(output), Classify(6).decode(output))
    assert torch.equal(Focal(6).decisions(output), Classify(6).decisions(output))


def test_numbers_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="gamma is -1"):
        Focal(3, -1.0)
    with pytest.raises(UserError, match="threshold 2"):
        SampleDependentFocal(3, threshold=2.0)


def test_it_obeys_the_laws() -> None:
    batch = Batch(torch.zeros(12, 3, 8, 8), torch.eye(4).repeat(3, 1))
    output = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    check_task(lambda: Focal(4), batch, output, 9 * batch.target)


def test_the_sample_dependent_one_obeys_the_laws() -> None:
    batch = Batch(torch.zeros(12, 3, 8, 8), torch.eye(4).repeat(3, 1))
    output = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    check_task(lambda: SampleDependentFocal(4), batch, output, 9 * batch.target)
