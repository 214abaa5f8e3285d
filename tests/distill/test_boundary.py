"""Boundary supporting samples against the official code, and what must be true of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.distill.boundary import BoundarySamples, base_images, draw_targets, soft_cross_entropy, weights_at
from galago.distill.distill import Distill
from galago.distill.lesson import Seen, View
from galago.distill.similarity import Similarity
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported
from galago.method import Forward, Method
from galago.models.tiny import Tiny
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.trainer import finish
from lessons import Golden, equal


def official(golden: Golden, whose: str) -> nn.Sequential:
    width, channels, *_ = golden(f"{whose}_conv_weight").shape
    classes, features = golden(f"{whose}_fc_weight").shape
    layers = nn.Conv2d(channels, width, 3, padding=1), nn.Linear(features, classes)
    network = nn.Sequential(layers[0], nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), layers[1]).double()
    for layer, name in zip(layers, ("conv", "fc"), strict=True):
        layer.weight.data.copy_(golden(f"{whose}_{name}_weight"))
        layer.bias.data.copy_(golden(f"{whose}_{name}_bias"))
    return network


def told(student: nn.Module, teacher: nn.Module, batch: Batch, progress: float) -> Seen:
    """What a lesson is given, with both networks as they are (`Distill` would compare them in float32)."""
    with torch.no_grad():
        wanted = teacher(batch.input)
    return Seen(View(student(batch.input), [], student), View(wanted, [], teacher), batch, progress)


def official_lesson(golden: Golden) -> BoundarySamples:
    rate = float(golden("eta").float())  # the official code holds it in float32
    return BoundarySamples(float(golden("T")), int(golden("max_attacked")), int(golden("steps")), rate)


def test_selection_targets_and_attack_are_the_official_ones() -> None:
    golden = Golden("bss")
    label, teacher = golden("y"), official(golden, "teacher")
    chosen, base = base_images(golden("z_student"), golden("z_teacher"), label, int(golden("max_attacked")))
    assert torch.equal(chosen, golden("base_index"))
    assert base.all()
    target = draw_targets(golden("z_teacher")[chosen], label[chosen], golden("uniforms"))
    assert torch.equal(target, golden("target_class"))
    moved = official_lesson(golden).attack(teacher, golden("x")[chosen], label[chosen], target, base)
    equal(moved, golden("x_attacked"))
    margin = margins(teacher(moved), label[chosen], target)
    equal(margins(teacher(golden("x")[chosen]), label[chosen], target), golden("margin_before"))
    equal(margin, golden("margin_after"), 1e-7)  # differences of logits that are nearly equal
    assert all(parameter.grad is None for parameter in teacher.parameters())


def margins(scores: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return (scores.gather(1, label.unsqueeze(1)) - scores.gather(1, target.unsqueeze(1))).squeeze(1)


def test_loss_and_gradients_are_the_official_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden("bss")
    monkeypatch.setattr(torch, "rand", lambda *size, **how: golden("uniforms"))
    student, teacher = official(golden, "student"), official(golden, "teacher")
    target = nn.functional.one_hot(golden("y"), 5).double()
    seen = told(student, teacher, Batch(golden("x"), target), int(golden("epoch")) / int(golden("max_epoch")))
    loss = official_lesson(golden)(seen)
    equal(loss, golden("weight_kd") * golden("loss_kd") + golden("weight_bss") * golden("loss_bss"))
    total = nn.functional.cross_entropy(seen.student.scores, target) + loss
    total.backward()
    equal(total, golden("total"))
    equal(student[0].weight.grad, golden("grad_student_conv_weight"))
    equal(student[4].weight.grad, golden("grad_student_fc_weight"))
    equal(student[4].bias.grad, golden("grad_student_fc_bias"))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weights_are_the_official_ones_epoch_by_epoch() -> None:
    golden = Golden("bss")
    rows = [golden(f"schedule_{name}").tolist() for name in ("epochs", "weight_kd", "weight_bss")]
    for epoch, of_batch, of_boundary in zip(*rows, strict=True):
        assert weights_at(epoch / 80) == pytest.approx((of_batch, of_boundary), abs=1e-12)


def test_entropies_are_those_of_a_loop_over_classes() -> None:
    own, its = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    p, q = (its / 3).softmax(1), (own / 3).softmax(1)
    expected = torch.stack([-sum(p[n, c] * q[n, c].log() for c in range(4)) for n in range(3)])
    torch.testing.assert_close(soft_cross_entropy(own, its, 3.0), expected)


def test_targets_come_as_often_as_the_teacher_holds_them_likely_and_are_never_the_label() -> None:
    teacher = torch.tensor([0.1, 0.5, 0.2, 0.2]).log().repeat(20_000, 1)
    drawn = draw_targets(teacher, torch.ones(20_000, dtype=torch.long), torch.rand(20_000))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.0, 0.4, 0.4]), atol=0.02, rtol=0)


def test_a_teacher_without_any_doubt_still_names_another_class() -> None:
    certain = torch.tensor([[500.0, 0.0, 0.0], [0.0, 500.0, 0.0], [0.0, 0.0, 500.0]])
    label = torch.arange(3)
    for uniform in (0.0, 0.999):
        assert (draw_targets(certain, label, torch.full((3,), uniform)) != label).all()


def batch_of(images: int = 24) -> Batch:
    whole = TinyImages(images).train()[0]
    return whole._replace(input=TinyImages().normalize(whole.input))


def trained() -> nn.Module:
    """A teacher that knows the images of `batch_of`."""
    teacher, batch = Tiny(classes=3, channels=3, width=8), batch_of()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(batch.input), batch.target).backward()
        optimizer.step()
    optimizer.zero_grad()
    return teacher.eval().requires_grad_(False)


def test_nearly_all_attacked_images_have_come_nearer_to_the_other_class() -> None:
    teacher, batch = trained(), batch_of()
    label = batch.target.argmax(1)
    said = teacher(batch.input)
    base = said.argmax(1) == label
    target = draw_targets(said, label, torch.rand(len(label)))
    moved = BoundarySamples().attack(teacher, batch.input, label, target, base)
    before, after = (margins(teacher(x), label, target)[base] for x in (batch.input, moved))
    assert base.sum() > 18
    assert after.mean() < before.mean()
    assert (after < before).float().mean() > 0.9
    assert torch.equal(moved[~base], batch.input[~base])
    assert moved[base].abs().max() <= 2.5


def test_an_image_without_a_gradient_is_left_where_it_is() -> None:
    def flat(images: Tensor) -> Tensor:
        return images.flatten(1).sum(1, keepdim=True) * torch.zeros(3) + torch.tensor([1.0, 0.0, 0.0])

    image, label = torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    moved = BoundarySamples().attack(flat, image, label, label + 1, torch.ones(2, dtype=torch.bool))
    assert torch.equal(moved, image)


def test_a_model_that_is_its_teacher_pays_the_teachers_entropy_alone() -> None:
    teacher, batch = trained(), batch_of()
    asked: list[Tensor] = []

    def ask(images: Tensor) -> Tensor:
        asked.append(images.detach())
        scores: Tensor = teacher(images)
        return scores

    seen = told(teacher, teacher, batch, 0.25)
    seen = seen._replace(teacher=seen.teacher._replace(ask=ask))
    loss = BoundarySamples(samples=len(batch.input))(seen)
    p = (seen.teacher.scores / 3).softmax(1)
    base = seen.teacher.scores.argmax(1) == batch.target.argmax(1)
    q = (teacher(asked[-1]) / 3).softmax(1)[: base.sum()]  # base images come first
    of_batch, of_boundary = weights_at(0.25)
    expected = of_batch * entropy(p).mean() + of_boundary * entropy(q).mean()
    torch.testing.assert_close(loss, expected)


def entropy(probability: Tensor) -> Tensor:
    return -(probability * probability.log()).sum(1)


def passes(network: nn.Module) -> list[int]:
    """How many images each pass of a network has, from now on."""
    counts: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    return counts


@pytest.mark.parametrize(("progress", "of_model", "of_teacher"), [(0.7, [24, 5], [24] + 4 * [5]), (0.75, [24], [24])])
def test_the_attack_takes_the_asked_passes_and_none_when_it_has_no_weight(
    progress: float, of_model: list[int], of_teacher: list[int]
) -> None:
    model, teacher = tiny_network(), tiny_network()
    method = Distill(teacher, [BoundarySamples(samples=5, steps=3)])
    method.prepare(model, TinyImages())
    seen = passes(model), passes(teacher)
    method.step(batch_of(), Forward(model, Classify(3), progress=progress))
    assert seen == (of_model, of_teacher)


def test_where_no_image_is_right_there_is_no_boundary_term() -> None:
    teacher, batch = trained(), batch_of()
    wrong = batch._replace(target=batch.target.roll(1, dims=1))
    seen = told(teacher, teacher, wrong, 0.0)
    label = wrong.target.argmax(1)
    nobody_right = seen._replace(student=seen.student._replace(scores=10 * batch.target))
    assert (label != nobody_right.student.scores.argmax(1)).all()
    loss = BoundarySamples()(nobody_right)
    torch.testing.assert_close(loss, 4 * soft_cross_entropy(10 * batch.target, seen.teacher.scores, 3.0).mean())


def test_one_right_image_alone_is_attacked() -> None:
    teacher, batch = trained(), batch_of()
    first = int((teacher(batch.input).argmax(1) == batch.target.argmax(1)).nonzero()[0])
    target = batch.target.roll(1, dims=1)
    target[first] = batch.target[first]
    seen = told(teacher, teacher, Batch(batch.input, target), 0.0)
    student = seen.student._replace(scores=10 * batch.target)
    loss = BoundarySamples().at_boundary(seen._replace(student=student))
    assert loss.isfinite()
    assert loss > 0


def test_neither_network_keeps_a_gradient_of_the_attack() -> None:
    model, teacher = tiny_network(), trained()
    method = Distill(teacher, [BoundarySamples()])
    method.prepare(model, TinyImages())
    step = method.step(batch_of(), Forward(model, Classify(3)))
    assert all(parameter.grad is None for network in (model, teacher) for parameter in network.parameters())
    step.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_batchnorm_sees_the_batch_and_then_the_attacked_images() -> None:
    model = tiny_network()
    method = Distill(trained(), [BoundarySamples()])
    method.prepare(model, TinyImages())
    model.train()
    before = clone(model.state_dict())
    method.step(batch_of(), Forward(model, Classify(3)))
    after = model.state_dict()
    assert {int(after[name] - before[name]) for name in after if "num_batches" in name} == {2}


def test_lessons_that_follow_still_have_the_batchs_features() -> None:
    image = batch_of()
    losses = []
    for lessons in ([Similarity()], [BoundarySamples(samples=24), Similarity()]):
        torch.manual_seed(5)
        model, teacher = tiny_network(), tiny_network()
        method = Distill(teacher, lessons)
        method.prepare(model, TinyImages())
        losses.append(method.step(image, Forward(model, Classify(3))).losses["similarity"])
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BoundarySamples(temperature=0.0), "temperature is 0.0"),
        (lambda: BoundarySamples(rate=-1.0), "rate is -1.0"),
        (lambda: BoundarySamples(limit=0.0), "limit is 0.0"),
        (lambda: BoundarySamples(samples=0), "samples 0 and steps 10"),
        (lambda: BoundarySamples(steps=0), "samples 64 and steps 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make: Callable[[], BoundarySamples], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_it_obeys_the_laws() -> None:
    check_method(lambda: Distill(tiny_network(), [BoundarySamples(steps=2), Similarity()]))


@pytest.mark.parametrize("outer", [True, False])
def test_a_quantized_model_learns_from_mixed_images_and_ships(outer: bool) -> None:
    def methods() -> list[Method]:
        others: list[Method] = [CutMix(probability=1.0), Quantize(LSQWeight(4), LSQ(4))]
        distill = Distill(tiny_network(), [BoundarySamples()])
        return [distill, *others] if outer else [*others, distill]

    started = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert started.step(number).losses["boundary_samples"].isfinite()
    image, finished = started.image(), finish(started.learner)
    with torch.no_grad():
        torch.testing.assert_close(exported(finished, image), finished(image))
