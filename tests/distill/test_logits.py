from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data, Loader, Normalize
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets, softened_divergence
from galago.errors import UserError
from galago.layers import swap
from galago.method import Forward, Method
from galago.quantize.layer import QuantLayer
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "distillation" / "kd_hinton.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


class Images(Data):
    """Nothing but what `prepare` asks for."""

    batch_size = 2
    classes = ("a", "b", "c")
    normalize = Normalize([0.5], [0.25])

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        raise AssertionError("nothing but the example is needed before training")

    def validation(self) -> Loader:
        raise AssertionError("nothing but the example is needed before training")

    def example(self) -> Tensor:
        return torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, classes))


def distilled(teacher: nn.Module, temperature: float = 4.0, weight: float = 0.9, task_weight: float = 0.1) -> Distill:
    """The classic: softened probabilities beside the labels."""
    return Distill(teacher, [SoftTargets(temperature, weight)], task_weight)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = network(), network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"main": self.main(x), "side": self.side(x)}


def batch() -> Batch:
    torch.manual_seed(5)
    return Batch(torch.randn(6, 1, 4, 4), torch.eye(3)[torch.arange(6) % 3])


def total(student: Tensor, **arguments: Any) -> Step:
    """One step in which the 'image' is already the student's scores and the teacher knows its own."""

    class Teacher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return golden("z_teacher").float()

    target = torch.eye(7)[golden("y")]
    return distilled(Teacher(), **arguments).step(Batch(student, target), Forward(nn.Identity(), Classify(7)))


def test_divergence_and_its_gradient_are_the_official_ones() -> None:
    for index, temperature in enumerate(GOLDEN["temperatures"]):
        student = golden("z_student").clone().requires_grad_()
        loss = softened_divergence(student, golden("z_teacher"), float(temperature))
        loss.backward()
        torch.testing.assert_close(loss.detach(), golden("expected_loss")[index])
        torch.testing.assert_close(student.grad, golden("grad_z_student")[index])


def test_large_scores_stay_finite() -> None:
    student = golden("extreme_z_student").clone().requires_grad_()
    loss = softened_divergence(student, golden("extreme_z_teacher"), 1.0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden("extreme_loss"))
    torch.testing.assert_close(student.grad, golden("extreme_grad"))


def test_total_and_its_gradient_are_the_official_ones() -> None:
    student = golden("z_student").float().requires_grad_()
    step = total(student, temperature=4.0, weight=0.9, task_weight=0.1)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(GOLDEN["total"]), rel=1e-6)
    assert step.losses["cross_entropy"].item() == pytest.approx(0.1 * float(GOLDEN["ce"]), rel=1e-6)
    torch.testing.assert_close(student.grad, golden("grad_total").float())
    assert step.loss.item() == pytest.approx(total(golden("z_student").float()).loss.item())  # these are the defaults


def test_divergence_approaches_half_the_squared_difference_at_high_temperature() -> None:
    loss = softened_divergence(golden("z_student"), golden("z_teacher"), 1e4)
    torch.testing.assert_close(loss, golden("limit_value"), rtol=1e-3, atol=0)


def test_divergence_is_zero_only_for_scores_that_differ_by_a_constant() -> None:
    scores = torch.randn(4, 5, dtype=torch.float64)
    assert softened_divergence(scores + torch.randn(4, 1), scores, 3.0).abs() < 1e-12
    assert softened_divergence(scores * 1.1, scores, 3.0) > 1e-6


def test_teacher_learns_nothing_and_stays_in_evaluation_mode() -> None:
    method, model = distilled(network()), network()
    method.train()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.step(batch(), Forward(model, Classify(3))).loss.backward()
    assert not any(module.training for module in method.teacher.modules())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert method.training
    assert not method.eval().training


def test_teacher_sees_the_batch_as_the_model_saw_it() -> None:
    class Darken(Method):
        def step(self, batch: Batch, inner: Forward) -> Step:
            return inner(batch._replace(input=batch.input * 0.5))

    teacher, model, given = network(), network(), batch()
    step = distilled(teacher, weight=1.0).step(given, Forward(model, Classify(3), (Darken(),)))
    expected = softened_divergence(step.output, teacher(given.input * 0.5), 4.0)
    torch.testing.assert_close(step.losses["soft_targets"], expected)


def test_main_output_is_distilled_where_there_are_several() -> None:
    teacher, model = TwoHeads(), TwoHeads()
    step = distilled(teacher, weight=1.0).step(batch(), Forward(model, Classify(3)))
    expected = softened_divergence(step.output["main"], teacher(batch().input)["main"], 4.0)
    torch.testing.assert_close(step.losses["soft_targets"], expected)


def test_task_weight_leaves_other_methods_losses_alone() -> None:
    class Penalty(Method):
        def step(self, batch: Batch, inner: Forward) -> Step:
            return inner(batch).add(penalty=torch.tensor(2.0))

    step = distilled(network(), weight=0.7).step(batch(), Forward(network(), Classify(3), (Penalty(),)))
    assert step.losses["penalty"].item() == 2.0
    alone = Forward(network(), Classify(3))(batch())
    assert step.losses.keys() == {*alone.losses, "penalty", "soft_targets"}


def test_a_teacher_of_other_classes_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="teacher tells 5 classes apart, the model 3"):
        distilled(network(5)).prepare(network(3), Images())


def test_a_teacher_of_another_normalization_is_refused_with_both() -> None:
    teacher = network()
    teacher.__dict__["normalization"] = Normalize([0.5], [0.5])  # as `galago.run.load` notes it
    with pytest.raises(UserError, match=r"std \[0.5\].*\[0.25\]"):
        distilled(teacher).prepare(network(), Images())
    teacher.__dict__["normalization"] = Normalize([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    with pytest.raises(UserError, match="mean"):
        distilled(teacher).prepare(network(), Images())


def test_a_teacher_of_the_same_normalization_is_welcome() -> None:
    teacher, model = network(), network()
    teacher.__dict__["normalization"] = Normalize([0.5], [0.25])
    assert distilled(teacher).prepare(model, Images()) is model


def test_preparing_leaves_the_model_and_the_random_state_untouched() -> None:
    model, method = nn.Sequential(network(), nn.Dropout()).train(), distilled(network())
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    method.prepare(model, Images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_finished_model_holds_nothing_of_the_teacher() -> None:
    model = network()
    method = distilled(network())
    finished = method.finish(method.prepare(model, Images()))
    teachers = {id(module) for module in method.modules()}
    assert not any(id(module) in teachers for module in finished.modules())
    assert finished.state_dict().keys() == network().state_dict().keys()


def test_half_precision_scores_are_compared_in_full() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3].bfloat16()

    step = distilled(Half(), weight=1.0).step(batch(), Forward(network(), Classify(3)))
    assert step.losses["soft_targets"].dtype == torch.float32


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(UserError, match="temperature"):
        distilled(network(), temperature=0.0)


def test_it_obeys_the_laws() -> None:
    check_method(lambda: distilled(tiny_network()))


def test_it_distills_into_a_quantized_network_within_the_laws() -> None:
    def quantized() -> nn.Module:
        model = tiny_network()
        swap(model, "down.0", QuantLayer(model.down[0], MinMaxWeight(4), MinMax(4)))
        return model

    check_method(lambda: distilled(tiny_network()), make_model=quantized)
