import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.tasks.classify import Classify
from galago.testing import check_task


def batch(count: int = 12, classes: int = 4) -> Batch:
    return Batch(torch.zeros(count, 1, 4, 4), torch.eye(classes)[torch.arange(count) % classes])


def output(count: int = 12, classes: int = 4) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(1))


def test_it_obeys_the_laws() -> None:
    check_task(lambda: Classify(4), batch(), output(), perfect=10 * batch().target)


def test_an_output_of_several_heads_obeys_the_laws_and_is_judged_by_the_main_one() -> None:
    perfect = {"main": 10 * batch().target, "side": output()}
    check_task(lambda: Classify(4), batch(), {"main": output(), "side": perfect["main"]}, perfect)
    assert torch.equal(Classify(4).decisions(perfect), batch().target.argmax(1))


def test_loss_is_cross_entropy_with_the_labels_where_targets_are_certain() -> None:
    found = Classify(4).losses(output(), batch())["cross_entropy"]
    torch.testing.assert_close(found, nn.functional.cross_entropy(output(), torch.arange(12) % 4))


def test_loss_is_least_where_the_output_equals_mixed_targets() -> None:
    target = torch.tensor([[0.7, 0.3, 0.0, 0.0]]).clamp_min(1e-12)
    mixed = Batch(torch.zeros(1, 1, 4, 4), target)
    best = Classify(4).losses(target.log(), mixed)["cross_entropy"]
    assert best.item() == pytest.approx(-(0.7 * torch.tensor(0.7).log() + 0.3 * torch.tensor(0.3).log()).item())
    assert Classify(4).losses(target.log() * 1.5, mixed)["cross_entropy"] > best


def test_a_constant_output_is_as_accurate_as_its_class_is_frequent() -> None:
    metrics, task = Classify(4).metrics(), Classify(4)
    metrics.update(task.decode(torch.zeros(12, 4)), batch().target)
    assert metrics.compute()["accuracy"].item() == pytest.approx(0.25)


def test_accuracy_is_that_of_all_batches_together() -> None:
    metrics = Classify(4).metrics()
    metrics.update(batch(4).target, batch(4).target)
    metrics.update(1 - batch(12).target, batch(12).target)
    assert metrics.compute()["accuracy"].item() == pytest.approx(4 / 16)
