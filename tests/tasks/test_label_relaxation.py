"""Label relaxation against its closed form, a search over the set, and what must be so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.tasks.label_relaxation import LabelRelaxation, nearest, relaxed_loss
from galago.testing import check_task


def some(images: int = 40, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    output = 2 * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    return output, torch.randint(classes, (images,), generator=generator)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.4])
def test_for_labels_it_is_the_loss_of_the_paper(alpha: float) -> None:
    output, label = some()
    p_y = output.softmax(1).gather(1, label[:, None])[:, 0].tolist()
    each = [
        0.0 if p >= 1 - alpha else (1 - alpha) * np.log((1 - alpha) / p) + alpha * np.log(alpha / (1 - p)) for p in p_y
    ]
    assert 0.0 in each or alpha < 0.1
    assert float(relaxed_loss(output, torch.eye(5).double()[label], alpha)) == pytest.approx(np.mean(each), abs=1e-12)


def test_for_labels_the_nearest_member_keeps_the_proportions_of_the_other_classes() -> None:
    output, label = some()
    p, target = output.softmax(1), torch.eye(5).double()[label]
    found = nearest(p, target, 0.1)
    other = p * (1 - target)
    wanted = 0.9 * target + 0.1 * other / other.sum(1, keepdim=True)
    outside = (p * target).sum(1) < 0.9
    torch.testing.assert_close(found[outside], wanted[outside], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[~outside], p[~outside], rtol=0, atol=1e-12)


def soft(images: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, classes, generator=generator, dtype=torch.float64).mul(2).softmax(1)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_the_nearest_member_is_in_the_set_and_no_other_is_nearer(alpha: float) -> None:
    output, _ = some(30, 4)
    p, target = output.softmax(1), soft(30, 4)
    found = nearest(p, target, alpha)
    torch.testing.assert_close(found.sum(1), torch.ones(30).double())
    assert (found >= (1 - alpha) * target - 1e-12).all()
    distance = (found * (found / p).log()).sum(1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        spread = torch.rand(30, 4, generator=generator, dtype=torch.float64).pow(3)
        other = (1 - alpha) * target + alpha * spread / spread.sum(1, keepdim=True)
        assert (distance <= (other * (other / p).log()).sum(1) + 1e-12).all()


def test_a_prediction_in_the_set_costs_nothing_and_has_no_gradient() -> None:
    target = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    output = torch.tensor([[0.56, 0.38, 0.06], [0.93, 0.03, 0.04]], dtype=torch.float64).log().requires_grad_()
    loss = relaxed_loss(output, target, 0.1)
    (gradient,) = torch.autograd.grad(loss, output)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_the_closed_form_although_the_member_is_constant() -> None:
    output, label = some(20)
    output.requires_grad_()
    p = output.softmax(1).gather(1, label[:, None])[:, 0]
    closed = torch.where(p >= 0.9, 0.0, 0.9 * (0.9 / p).log() + 0.1 * (0.1 / (1 - p)).log()).mean()
    ours = relaxed_loss(output, torch.eye(5).double()[label], 0.1)
    torch.testing.assert_close(*(torch.autograd.grad(loss, output)[0] for loss in (ours, closed)), rtol=0, atol=1e-12)


def test_without_relaxation_it_is_the_cross_entropy_less_the_entropy_of_the_target() -> None:
    output, label = some()
    hard, mixed = torch.eye(5).double()[label], soft(40, 5)
    torch.testing.assert_close(relaxed_loss(output, hard, 0.0), nn.functional.cross_entropy(output, label))
    entropy = torch.special.entr(mixed).sum(1).mean()
    torch.testing.assert_close(relaxed_loss(output, mixed, 0.0), nn.functional.cross_entropy(output, mixed) - entropy)


def test_more_relaxation_never_costs_more() -> None:
    output, label = some()
    target = torch.eye(5).double()[label]
    losses = [float(relaxed_loss(output, target, alpha)) for alpha in (0.0, 0.05, 0.1, 0.3, 0.9)]
    assert losses == sorted(losses, reverse=True)


def test_the_loss_and_its_gradient_are_finite_where_the_network_is_quite_sure_or_quite_wrong() -> None:
    output = torch.tensor([[300.0, 0, 0], [0, 0, 300.0]], requires_grad=True)
    loss = relaxed_loss(output, torch.eye(3)[[0, 0]], 0.1)
    (gradient,) = torch.autograd.grad(loss, output)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_a_relaxation_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha is"):
        LabelRelaxation(3, alpha)


def test_the_task_has_one_loss() -> None:
    output, label = some(8, 4)
    batch = Batch(torch.zeros(8, 3, 4, 4), torch.eye(4)[label])
    found = LabelRelaxation(4).losses(output, batch)["label_relaxation"]
    assert float(found) == pytest.approx(float(relaxed_loss(output, batch.target.double(), 0.1)), abs=1e-6)


def test_it_obeys_the_laws() -> None:
    batch = Batch(torch.zeros(12, 3, 8, 8), torch.eye(4).repeat(3, 1))
    output = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    check_task(lambda: LabelRelaxation(4), batch, output, 9 * batch.target)
