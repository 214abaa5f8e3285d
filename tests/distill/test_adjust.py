"""Knowledge adjustment against the library's numbers, and the two ways in which an adjusted teacher teaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.data import Normalize
from galago.distill.adjust import Adjusted, AdjustedTargets, shifted, smoothed
from galago.distill.decoupled import Decoupled
from galago.distill.distill import Distill
from galago.distill.hints import Hints
from galago.distill.lesson import Seen, View
from galago.distill.logits import SoftTargets, softened_divergence
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported
from galago.method import Forward, Method
from galago.models.tiny import Tiny
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.schedule import LinearDecay
from galago.task import Task
from galago.tasks.abstain import ClassifyOrAbstain, gambler_loss
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.trainer import finish
from lessons import Golden, equal

GOLDEN = Golden("abstention")
LABEL = GOLDEN("y")
RAW = GOLDEN("raw_target")


def test_shifted_and_smoothed_rows_are_those_of_the_library() -> None:
    softened = (GOLDEN("teacher_logits") / GOLDEN("T")).softmax(1)
    equal(softened, RAW)
    equal(shifted(softened, LABEL), GOLDEN("ka_target"))
    equal(smoothed(softened, LABEL, float(GOLDEN("lsr_p"))), GOLDEN("lsr_target"), 1e-6)


def test_the_rows_of_the_card_are_found() -> None:
    rows = torch.tensor([[3.0, 1, 0], [0, 2, 1]]).double().softmax(1)
    found = shifted(rows, torch.tensor([1, 1]))
    expected = [[0.114195, 0.843795, 0.042010], [0.090031, 0.665241, 0.244728]]
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=5e-7, rtol=0)


def some_rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 7, generator=generator, dtype=torch.float64).softmax(1)
    return rows, torch.randint(7, (200,), generator=generator)


def test_after_the_shift_every_row_is_right_and_has_the_probabilities_it_had() -> None:
    rows, label = some_rows()
    found = shifted(rows, label)
    assert torch.equal(found.argmax(1), label)
    assert torch.equal(found.sort(1).values, rows.sort(1).values)
    right = rows.argmax(1) == label
    assert 0 < right.sum() < 200
    assert torch.equal(found[right], rows[right])
    assert ((found != rows).sum(1) == torch.where(right, 0, 2)).all()


def test_smoothing_touches_wrong_rows_only_and_keeps_their_sum() -> None:
    rows, label = some_rows()
    found, right = smoothed(rows, label, 0.9), rows.argmax(1) == label
    assert torch.equal(found[right], rows[right])
    torch.testing.assert_close(found.sum(1), torch.ones(200, dtype=torch.float64))
    assert torch.equal(found.argmax(1), label)
    assert (found[~right].max(1).values == 0.9).all()


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_tie_between_the_label_and_the_first_of_the_largest_changes_nothing(label: int) -> None:
    row = torch.tensor([[0.4, 0.4, 0.2]])
    expected = row if label < 2 else torch.tensor([[0.2, 0.4, 0.4]])
    assert torch.equal(shifted(row, torch.tensor([label])), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_shifting_scores_is_shifting_probabilities_at_any_temperature(temperature: float) -> None:
    z = GOLDEN("teacher_logits")
    found = (shifted(z, LABEL) / temperature).softmax(1)
    torch.testing.assert_close(found, shifted((z / temperature).softmax(1), LABEL))


def test_an_adjusted_lesson_hears_the_shifted_teacher() -> None:
    student, teacher = GOLDEN("student_logits")[:, :5].float(), GOLDEN("teacher_logits").float()
    batch = Batch(student, nn.functional.one_hot(LABEL, 5).float())
    seen = Seen(View(student, []), View(teacher, []), batch, 0.5)
    q = GOLDEN("ka_target").float()
    expected = 16 * nn.functional.kl_div((student / 4).log_softmax(1), q, reduction="batchmean")
    torch.testing.assert_close(Adjusted(SoftTargets(4.0))(seen), expected, rtol=1e-5, atol=1e-6)
    assert Adjusted(SoftTargets(4.0))(seen) != SoftTargets(4.0)(seen)
    right = Batch(student, nn.functional.one_hot(teacher.argmax(1), 5).float())
    for lesson in (SoftTargets(), Decoupled()):
        assert torch.equal(Adjusted(lesson)(seen._replace(batch=right)), lesson(seen._replace(batch=right)))


def test_an_adjusted_lesson_keeps_its_weight_and_its_schedule() -> None:
    assert Adjusted(SoftTargets(weight=0.5)).weight == 0.5
    schedule = LinearDecay()
    assert Adjusted(SoftTargets(weight=schedule)).weight is schedule


def test_a_lesson_on_layers_cannot_be_adjusted() -> None:
    with pytest.raises(UserError, match="Hints compares layers"):
        Adjusted(Hints())


class Told(Method):
    """Remembers the batch that reached it."""

    def step(self, batch: Batch, inner: Forward):
        self.batch = batch
        return inner(batch)


def step_of(methods: list[Method], task: Task, outputs: int) -> tuple[dict[str, Tensor], Trial]:
    trial = Trial(lambda: Tiny(classes=outputs, channels=3, width=5), task, TinyImages(), lambda: methods)
    return trial.step(0).losses, trial


def test_targets_are_the_adjusted_teacher_and_so_the_tasks_loss_is_the_soft_gambler_loss() -> None:
    teacher, told = tiny_network(), Told()
    task = ClassifyOrAbstain(3, payoff=2.0, pretraining=0.0)
    method = AdjustedTargets(teacher, temperature=2.0)
    trial = Trial(lambda: Tiny(classes=4, channels=3, width=5), task, TinyImages(), lambda: [method, told])
    step = trial.step(0)
    with torch.no_grad():
        raw = (teacher(step.batch.input) / 2).softmax(1)
    label = trial.batches[0].target.argmax(1)
    assert torch.equal(told.batch.target, shifted(raw, label))
    assert torch.equal(step.losses["gambler"], gambler_loss(step.output, shifted(raw, label), 2.0))
    assert list(step.losses) == ["gambler"]


def test_a_confidence_smooths_wrong_rows_instead() -> None:
    teacher, told = tiny_network(), Told()
    _, trial = step_of([AdjustedTargets(teacher, confidence=0.8), told], classify(), 3)
    with torch.no_grad():
        raw = (teacher(told.batch.input) / 4).softmax(1)
    assert torch.equal(told.batch.target, smoothed(raw, trial.batches[0].target.argmax(1), 0.8))


def test_pretraining_learns_the_adjusted_teacher_by_cross_entropy() -> None:
    task = ClassifyOrAbstain(3, payoff=1.5, pretraining=0.5)
    losses, _ = step_of([AdjustedTargets(tiny_network())], task, 4)
    assert list(losses) == ["cross_entropy"]


def test_in_front_of_cutmix_what_the_teacher_says_is_mixed() -> None:
    told = Told()
    torch.manual_seed(3)
    step_of([AdjustedTargets(tiny_network()), CutMix(probability=1.0), told], classify(), 3)
    torch.testing.assert_close(told.batch.target.sum(1), torch.ones(8))
    assert (told.batch.target > 0).all()


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_adjusted_targets_obey_the_laws(confidence: float | None) -> None:
    check_method(lambda: AdjustedTargets(tiny_network(), confidence=confidence))


def test_adjusted_lessons_obey_the_laws() -> None:
    check_method(lambda: Distill(tiny_network(), [Adjusted(SoftTargets(20.0, 0.5)), Adjusted(Decoupled())]))


def test_a_quantized_student_that_may_abstain_learns_from_a_teacher_that_may_not_and_is_exported() -> None:
    task = ClassifyOrAbstain(3)
    teaching = Distill(tiny_network(), [Adjusted(SoftTargets()), Hints(1.0, layers=[-1])])
    methods = [teaching, Quantize(LSQWeight(4), LSQ(4))]
    trial = Trial(lambda: Tiny(classes=4, channels=3, width=5), task, TinyImages(), lambda: methods)
    for number in range(2):
        step = trial.step(number)
    assert step.losses.keys() == {"gambler", "adjusted", "hints"}
    finished = finish(trial.learner)
    assert exported(finished, trial.image()).shape == (2, 4)


def test_without_the_adjustment_the_first_scores_of_an_abstaining_student_are_compared() -> None:
    method = Distill(tiny_network(), [SoftTargets()])
    model = Tiny(classes=4, channels=3, width=5)
    method.prepare(model, TinyImages())
    batch = Batch(torch.randn(4, 3, 8, 8), torch.eye(3)[[0, 1, 2, 0]])
    step = method.step(batch, Forward(model.eval(), ClassifyOrAbstain(3)))
    with torch.no_grad():
        wanted = method.teacher(batch.input)
    expected = 0.9 * softened_divergence(step.output[:, :3], wanted, 4.0)
    torch.testing.assert_close(step.losses["soft_targets"], expected)


def test_a_model_with_one_class_too_many_for_its_data_is_not_taken_for_one_that_abstains() -> None:
    with pytest.raises(UserError, match="the teacher tells 4 classes apart, the model 5"):
        Distill(Tiny(4, 3), [SoftTargets()]).prepare(Tiny(5, 3), TinyImages())


def test_a_teacher_of_other_classes_normalization_or_without_sense_is_refused() -> None:
    with pytest.raises(UserError, match="the teacher tells 4 classes apart, the model 3"):
        AdjustedTargets(Tiny(4, 3)).prepare(tiny_network(), TinyImages())
    damaged = tiny_network()
    damaged.head.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        AdjustedTargets(damaged).prepare(tiny_network(), TinyImages())
    other = tiny_network()
    other.__dict__["normalization"] = Normalize([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    with pytest.raises(UserError, match="normalized with mean"):
        AdjustedTargets(other).prepare(tiny_network(), TinyImages())


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="temperature is 0"):
        AdjustedTargets(tiny_network(), temperature=0)
    with pytest.raises(UserError, match=r"confidence is 1\.5"):
        AdjustedTargets(tiny_network(), confidence=1.5)


def test_the_teacher_does_not_learn_and_stays_in_evaluation_mode() -> None:
    teacher = tiny_network()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    _, trial = step_of([AdjustedTargets(teacher)], Classify(3), 3)
    trial.step(1)
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
