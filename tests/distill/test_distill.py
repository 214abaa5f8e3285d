"""One teacher and several lessons: what is checked before training, what a step does, what is left at the end."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import pytest
import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from galago.batch import Batch
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.distill.hints import Hints
from galago.distill.lesson import Lesson, Seen, View
from galago.distill.logits import SoftTargets
from galago.distill.relations import Relations
from galago.distill.similarity import Similarity
from galago.distill.solution_flow import SolutionFlow
from galago.errors import UserError
from galago.laws.trial import TinyImages
from galago.method import Forward
from galago.models.resnet import resnet20
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.schedule import LinearDecay
from galago.stages import stages
from galago.taps import Taps
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network

CLASSES = 3


class Asking(SoftTargets):
    """Asks both networks about one further image; the model's answer counts."""

    def forward(self, seen: Seen) -> Tensor:
        image = seen.batch.input[:1] + 1
        self.told = seen.student.ask(image), seen.teacher.ask(image)
        return self.told[0].square().sum()


class Told(Similarity):
    """Keeps what it is given."""

    def forward(self, seen: Seen) -> Tensor:
        self.told = seen
        return super().forward(seen)


class Net(nn.Module):
    """Two stages; the second ends in a ReLU that overwrites what the convolution before it gave."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.second(self.first(x)).mean((2, 3)))
        return scores


def batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    return Batch(torch.randn(6, 3, 8, 8, generator=generator), torch.eye(CLASSES)[torch.arange(6) % CLASSES])


def prepared(lessons: Sequence[Lesson], model: nn.Module, teacher: nn.Module | None = None) -> Distill:
    method = Distill(Net(6) if teacher is None else teacher, lessons)
    method.prepare(model, TinyImages())
    return method


def test_stages_of_published_networks_are_found() -> None:
    assert stages(resnet20().eval(), torch.zeros(1, 3, 32, 32)) == ["layer1", "layer2", "layer3"]
    found = stages(timm.create_model("resnet18").eval(), torch.zeros(1, 3, 64, 64))
    assert found == ["act1", "layer1", "layer2", "layer3", "layer4"]


def test_where_no_layers_are_named_stages_are_compared() -> None:
    method = prepared([Attention(layers=[-2, -1]), Similarity()], Net())
    assert [lesson.paths for lesson in method.lessons] == [["first", "second"], ["second"]]
    assert "first" in rendered(method)


def rendered(method: Distill) -> str:
    table = method.summary()
    assert isinstance(table, Table)
    return " ".join(str(cell) for column in table.columns for cell in column.cells)


def test_the_teachers_cost_is_said_with_a_table_and_without() -> None:
    expected = r"the teacher: 0.0 MiB of weights, \S+ ms an image here, \S+ times the model's forward pass"
    for lessons in ([SoftTargets()], [Similarity()]):
        found = prepared(lessons, Net()).summary()
        assert re.fullmatch(expected, str(found.caption if isinstance(found, Table) else found))


def test_a_misspelt_layer_is_named_with_the_nearest_before_any_training() -> None:
    with pytest.raises(UserError, match=r"no layer 'secnd'; did you mean second"):
        prepared([Attention(layers=["secnd"])], Net())


def test_a_stage_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"Similarity: the teacher has no stage 2; its stages are 0: first, 1: second"):
        prepared([Similarity(layers=[0], teacher_layers=[2])], Net())


def test_a_layer_that_does_not_run_is_named() -> None:
    model = Net()
    model.idle = nn.ReLU()
    with pytest.raises(UserError, match="the model: layer 'idle' gives nothing"):
        prepared([Similarity(layers=["idle"], teacher_layers=["second"])], model)


def test_a_teacher_whose_scores_are_not_finite_is_refused() -> None:
    teacher = Net()
    teacher.head.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        prepared([SoftTargets()], Net(), teacher)


def test_without_lessons_there_is_nothing_to_teach() -> None:
    with pytest.raises(UserError, match="lessons is empty"):
        Distill(Net(), [])


def test_every_lesson_sees_its_layers_of_one_pass_of_the_teacher() -> None:
    passes = []

    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:
            passes.append(len(x))
            return super().forward(x)

    model, teacher = Net(), Counting(6)
    method = prepared(
        [SoftTargets(), Attention(layers=[0, 1]), Hints(layers=[0]), Relations(), SolutionFlow(layers=[0, 1])],
        model,
        teacher,
    )
    passes.clear()
    step = method.step(batch(), Forward(model, Classify(CLASSES)))
    assert passes == [6]
    assert list(step.losses) == ["cross_entropy", "soft_targets", "attention", "hints", "relations", "solution_flow"]


def test_features_are_those_of_this_batch_and_teach_the_layers_below() -> None:
    model, teacher, lesson = Net(), Net(6), Told(layers=["second.0"])
    method = prepared([lesson], model, teacher)
    step = method.step(batch(), Forward(model, Classify(CLASSES)))
    expected = model.second[0](model.first(batch().input))
    torch.testing.assert_close(lesson.told.student.features[0], expected)  # not what the ReLU made of it, in place
    torch.testing.assert_close(lesson.told.teacher.features[0], teacher.second[0](teacher.first(batch().input)))
    step.losses["told"].backward()
    assert model.first[0].weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_lesson_may_ask_both_networks_and_no_tap_notices_not_even_another_methods() -> None:
    model, asking, behind, outside = Net(), Asking(), Told(layers=[0]), Told(layers=[0])
    inner, outer = prepared([asking, behind], model), prepared([outside], model)
    inner.names[1] = "behind"
    step = outer.step(batch(), Forward(model, Classify(CLASSES), [inner]))
    for lesson in (behind, outside):
        assert torch.equal(lesson.told.student.features[0], model.first(batch().input))
    image = batch().input[:1] + 1
    for answer, network in zip(asking.told, (model, inner.teacher), strict=True):
        assert torch.equal(answer, network(image))
    step.losses["asking"].backward()
    assert model.head.weight.grad.abs().sum() > 0


def test_a_compiled_network_may_be_asked_too() -> None:
    model, asking = Net().eval(), Asking()
    method = prepared([asking, Attention(layers=[0, 1])], model)
    plain = method.step(batch(), Forward(model, Classify(CLASSES)))
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        step = method.step(batch(), Forward(compiled, Classify(CLASSES)))
        for name, loss in plain.losses.items():
            torch.testing.assert_close(step.losses[name], loss)


def test_while_a_lesson_is_fitted_there_is_nobody_to_ask() -> None:
    class Early(SoftTargets):
        def fit(self, student: View, teacher: View) -> None:
            student.ask(torch.zeros(1, 3, 8, 8))

    with pytest.raises(RuntimeError, match="only in a training step"):
        prepared([Early()], Net())


def test_two_lessons_of_a_kind_have_names_of_their_own() -> None:
    model = Net()
    method = prepared([Similarity(layers=[0]), Similarity(layers=[1])], model)
    assert {"similarity", "similarity_2"} <= method.step(batch(), Forward(model, Classify(CLASSES))).losses.keys()


def test_a_weight_may_follow_a_schedule() -> None:
    model = Net()
    method = prepared([Similarity(weight=LinearDecay())], model)
    losses = [
        method.step(batch(), Forward(model, Classify(CLASSES), progress=progress)).losses["similarity"].item()
        for progress in (0.0, 0.75, 1.0)
    ]
    assert losses[1] == pytest.approx(losses[0] / 4)
    assert losses[2] == 0


def test_nothing_is_left_in_the_finished_model_nor_in_a_copy_of_it() -> None:
    model = Net()
    method = prepared([Attention(layers=[0, 1]), Hints(layers=[1])], model)
    average = copy.deepcopy(model)
    for network in (model, average):
        assert any(module._forward_hooks for module in network.modules())
        assert method.finish(network) is network
        assert not any(module._forward_hooks for module in network.modules())
    assert model.state_dict().keys() == Net().state_dict().keys()


def test_taps_of_a_compiled_network_hold_what_it_gave_last() -> None:
    model = Net().eval()
    taps = Taps(model, ["first", "second.0"])
    model(batch().input)
    taps.check("the model")
    compiled = torch.compile(model, backend="eager")
    for scale in (1.0, -2.0, 3.0):
        image = scale * batch().input
        compiled(image)
        torch.testing.assert_close(taps.values["first"], model.first[1](model.first[0](image)))
        torch.testing.assert_close(taps.values["second.0"], model.second[0](model.first(image)))


def test_it_obeys_the_laws_with_lessons_of_every_kind() -> None:
    check_method(lambda: Distill(tiny_network(), [SoftTargets(), Attention(1.0, layers=[-1]), Hints(1.0, layers=[-1])]))
    check_method(lambda: Distill(tiny_network(), [Relations(), Similarity(), SolutionFlow(layers=[-2, -1])], 0.5))


@pytest.mark.parametrize("first", [True, False])
def test_features_of_a_quantized_network_are_distilled_wherever_quantize_is_listed(first: bool) -> None:
    data, model = TinyImages(), tiny_network()
    methods = [Distill(tiny_network(), [Similarity(), Hints(1.0, layers=[-1])]), Quantize(LSQWeight(4), LSQ(4))]
    for method in methods if first else reversed(methods):
        model = method.prepare(model, data)
    image = data.normalize(data.example())
    given = Batch(torch.cat([image, -image]), torch.eye(CLASSES)[:2])
    step = methods[0].step(given, Forward(model, Classify(CLASSES)))
    step.loss.backward()
    assert step.loss.isfinite()
    assert all(p.grad is not None for p in methods[0].lessons.parameters())
